"""Where this platform keeps what is the user's own; `SANA_*` variables move it."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$SANA_CACHE_DIR`, else the place that this platform keeps for caches."""
    chosen = os.environ.get("SANA_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("sana", appauthor=False)


def config_file() -> Path:
    """`$SANA_CONFIG`, else `config.toml` where this platform keeps configuration."""
    chosen = os.environ.get("SANA_CONFIG")
    if chosen:
        return Path(os.path.expanduser(chosen))
    from platformdirs import user_config_path

    return user_config_path("sana", appauthor=False) / "config.toml"


def used_bytes(folder: Path) -> int:
    """Of all files in a folder and below; 0 if it is not there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
