"""`python -m tokred_kernels`: the `tokred` command."""

import sys

from .cli import main

sys.exit(main())
