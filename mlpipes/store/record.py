"""A record with a type: a pydantic model that lies in the store as a JSON object with its own checksum."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from mlpipes.errors import FormatError
from mlpipes.settings import problems
from mlpipes.store.files import read_record, write_record


class Record(BaseModel):
    """What one process writes into the store for others; what another version of mlpipes says besides is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def write_to(self, path: Path) -> None:
        """Write it atomically. Raises ValueError for a number that is not finite, which JSON cannot say."""
        write_record(path, self.model_dump(mode="json"))

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write_to` wrote. Raises FileNotFoundError, CorruptionError, or FormatError if a field is not there."""
        try:
            return cls.model_validate(read_record(path))
        except ValidationError as error:
            raise FormatError(
                f"{path} was written by another version of mlpipes ({problems(error)}). It was left as it is. Use that "
                "version, or materialize the whole chain again, with the config `fresh: true` for `checkpoints`."
            ) from error
