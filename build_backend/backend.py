"""PEP 517 backend that compiles against the torch of the environment being installed into.

Under build isolation pip hides that environment's packages but runs its interpreter, so sysconfig still names its
site-packages. torch becomes a build requirement only where there is none; the extensions use libtorch's stable ABI, so
any torch >= 2.10 will do.
"""

import importlib.machinery
import os
import sys
import sysconfig

from setuptools.build_meta import *  # noqa: F403


def _target_site() -> str | None:
    for kind in ("platlib", "purelib"):
        site = sysconfig.get_path(kind)
        if os.path.isfile(os.path.join(site, "torch", "utils", "cpp_extension.py")):
            return site
    return None


_have_torch = importlib.machinery.PathFinder.find_spec("torch") is not None
if not _have_torch and (_site := _target_site()):
    sys.path.append(_site)  # last: the isolated environment's setuptools keeps priority
    _have_torch = True


def get_requires_for_build_wheel(config_settings=None):
    return ["ninja"] if _have_torch else ["ninja", "numpy", "torch>=2.10"]


def get_requires_for_build_editable(config_settings=None):
    return get_requires_for_build_wheel(config_settings)


def get_requires_for_build_sdist(config_settings=None):
    return []
