"""The contract of finetune-operator: pure pydantic models and arithmetic.

Everything that crosses a boundary is a type of this package: what a user writes (`job`, `profile`), what a pod is told
(`run`), what it answers (`failures`, `progress`), what it leaves in S3 (`manifest`). It does no I/O, reads no clock and
imports nothing of the other packages.
"""

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
