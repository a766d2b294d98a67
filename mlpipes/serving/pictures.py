"""Pictures in a folder as samples of a model: decoded as its training's were, once, into an array in the home's cache."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from mlpipes.data.class_folders import images_below
from mlpipes.data.image_file import Decoder
from mlpipes.data.image_folder import decoded_files
from mlpipes.errors import DataError
from mlpipes.serving.signature import Signature

_COLOURS = {1: "grey", 3: "rgb"}


def decoder_for(signature: Signature, own: Decoder | None) -> Decoder:
    """What turns pictures into what a model takes; `own` is that of the folder it was trained on, if it was on one.

    Otherwise a picture is scaled until it covers what the model takes, and what is over is cut off.
    Raises DataError if the model takes no pictures of one size.
    """
    column = signature.inputs[0]
    if not signature.is_tensor or column.dtype != "uint8" or len(column.shape) != 3 or column.shape[0] not in _COLOURS:
        raise DataError("a folder holds pictures, and the model takes none: give a file")
    channels, height, width = column.shape
    if -1 in (height, width):
        raise DataError("the model takes pictures of any size, each with an answer of its own: give them as .npy")
    of_folder = own or Decoder(height, width, "rgb", "cover", 255)
    return replace(of_folder, height=height, width=width, colour=_COLOURS[channels])


def pictures(folder: Path, decoder: Decoder) -> tuple[Path, tuple[str, ...]]:
    """The file with all pictures at any depth below a folder, (N, channels, height, width), and their names.

    Raises DataError if there is none, or naming those that cannot be used.
    """
    paths, _ = images_below(folder)
    array = decoded_files(folder, paths, decoder)
    assert isinstance(array, np.memmap)  # noqa: S101 - of the cache
    return Path(str(array.filename)), tuple(path.relative_to(folder).as_posix() for path in paths)
