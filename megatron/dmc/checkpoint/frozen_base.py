"""The checkpoint with the frozen weights of a run that trained adapters only (``--freeze-base``). No torch."""

import hashlib
import json
from pathlib import Path
from typing import Optional

from megatron.dmc.checkpoint.manifest import Manifest, read_manifest, resolve_checkpoint


def base_hash(manifest: Manifest) -> Optional[str]:
    """SHA-256 of names, sizes and CRC-32 of the files with a checkpoint's weights; None when it has no checksums."""
    weights = [name for name in manifest.files if name.endswith(".distcp")]
    if not weights or not all(name in manifest.crc32 for name in weights):
        return None
    listed = [(name, manifest.files[name], manifest.crc32[name]) for name in sorted(weights)]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def find_base(checkpoint: Path, manifest: Manifest, elsewhere: Optional[Path] = None) -> Path:
    """Checkpoint that holds the weights of ``checkpoint`` that are not its adapters: itself when it holds all weights.

    Args:
        elsewhere: checkpoint to take instead of the path in the manifest.

    Raises:
        ValueError: the base is not there, or its weights are not those that the adapters were trained on.
    """
    if manifest.base is None:
        return checkpoint
    path = elsewhere or Path(manifest.base)
    if not path.is_dir():
        raise ValueError(
            f"{checkpoint} holds adapters for the frozen weights in {path}, which is not there; put that checkpoint "
            "back, or a link to where it is"
        )
    path = resolve_checkpoint(path)
    if base_hash(read_manifest(path)) != manifest.base_hash:
        raise ValueError(
            f"{path} has other weights than those that the adapters in {checkpoint} were trained on; restore it from a "
            "copy"
        )
    return path
