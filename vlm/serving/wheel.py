"""Wheel of the package that runs, for an image: a package registry may not have this version."""

import base64
import hashlib
import importlib.metadata
import zipfile
from pathlib import Path

from vlm._version import __version__
from vlm.errors import ConfigError

DISTRIBUTION = "vlm-jax"
TAG = "py3-none-any"
_WHEEL = f"Wheel-Version: 1.0\nGenerator: vlm {__version__}\nRoot-Is-Purelib: true\nTag: {TAG}\n"
_DATE = (1980, 1, 1, 0, 0, 0)  # equal files make an equal wheel, so that builds are cached


def write_wheel(folder: Path) -> Path:
    """Write the installed package as a wheel, and return its path.

    The files are those of the package that was imported, also if it is an editable install.

    Raises:
        ConfigError: the package is not installed, or its metadata is of another version.
    """
    try:
        installed = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"{DISTRIBUTION} is not installed: run pip install in its folder"
        ) from None
    if installed.version != __version__:
        raise ConfigError(
            f"the installed metadata of {DISTRIBUTION} is that of version {installed.version}, and "
            f"the package is {__version__}: install it again"
        )
    name = f"{DISTRIBUTION.replace('-', '_')}-{__version__}"
    package = Path(__file__).parents[1]
    files = {
        f"{package.name}/{path.relative_to(package).as_posix()}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    for part in ("METADATA", "entry_points.txt"):
        files[f"{name}.dist-info/{part}"] = (installed.read_text(part) or "").encode()
    files[f"{name}.dist-info/WHEEL"] = _WHEEL.encode()
    record = [f"{path},{_digest(data)},{len(data)}" for path, data in files.items()]
    files[f"{name}.dist-info/RECORD"] = "\n".join(
        [*record, f"{name}.dist-info/RECORD,,", ""]
    ).encode()
    wheel = folder / f"{name}-{TAG}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            entry = zipfile.ZipInfo(path, _DATE)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return wheel


def _digest(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
    return f"sha256={digest.decode().rstrip('=')}"
