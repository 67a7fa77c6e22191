"""Imported before processes are forked that train: everything that a rank imports, as soon as it starts or later."""

import gc
from importlib import import_module

LATER = (
    "deepspeed",
    "setuptools",
    "sklearn.metrics",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.utils",
)
"""What a rank imports once it knows its job."""
MODULES = ("finetune_trainer.prepare", "finetune_trainer.pull", "finetune_trainer.train", *LATER)

for module in MODULES:
    import_module(module)
# Else the first collection of each fork goes through a million objects, and with that copies their pages.
gc.collect()
gc.freeze()
