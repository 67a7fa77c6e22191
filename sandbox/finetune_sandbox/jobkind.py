"""x"""

from finetune_sandbox.errors import Cause, Obj


def default(o: Obj) -> None: ...
def prepare(o: Obj, old: Obj | None) -> None:
    if old is None:
        o["status"] = {"phase": "Pending", "qosClass": "BestEffort"}


def validate(o: Obj, old: Obj | None) -> list[Cause]:
    return []
