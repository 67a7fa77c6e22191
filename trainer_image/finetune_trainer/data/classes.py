"""The classes of Labelled data: what training shows is what can be predicted."""

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import Split

LIMIT = 1000
"""More classes than this are a column of something else."""


class Classes:
    def __init__(self) -> None:
        self._trained: set[str] = set()
        self._held_out: dict[str, str] = {}
        """Name -> the first place where it stands."""

    def see(self, name: str, split: Split, place: str) -> None:
        """`place`: field, file and line. Raises DataInvalid where there are too many."""
        if split != "train":
            self._held_out.setdefault(name, place)
            return
        self._trained.add(name)
        if len(self._trained) > LIMIT:
            raise FineTuneError(
                Reason.DATA_INVALID, f"{place}: more than {LIMIT:,} classes; is it the right column (columns.label)?"
            )

    def names(self) -> list[str]:
        """In order, numbers as numbers. Raises DataInvalid where they cannot be learned or not be evaluated."""
        found = sorted(self._trained, key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))
        listed = ", ".join(found[:10]) + (", …" if len(found) > 10 else "")
        if len(found) < 2:
            raise FineTuneError(
                Reason.DATA_INVALID, f"spec.datasets: found {listed or 'no class'}; at least two classes are needed"
            )
        for name, place in self._held_out.items():
            if name not in self._trained:
                raise FineTuneError(
                    Reason.DATA_INVALID, f"{place}: the class {name!r} is in no training row; found {listed}"
                )
        return found
