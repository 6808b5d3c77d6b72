"""The user's cache folder and config file on this platform; `SANA_*` variables override them."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `$SANA_CACHE_DIR`, else the platform's cache folder."""
    chosen = os.environ.get("SANA_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("sana", appauthor=False)


def config_file() -> Path:
    """Return `$SANA_CONFIG`, else `config.toml` in the platform's configuration folder."""
    chosen = os.environ.get("SANA_CONFIG")
    if chosen:
        return Path(os.path.expanduser(chosen))
    from platformdirs import user_config_path

    return user_config_path("sana", appauthor=False) / "config.toml"


def used_bytes(folder: Path) -> int:
    """Return the total size of all files below a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
