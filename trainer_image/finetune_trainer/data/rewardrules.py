"""The reward expressions of a job, tried on its own rows before a GPU is asked for."""

import io

import pyarrow.parquet as pq
from tokenizers import Tokenizer

from finetune_api.failures import FineTuneError
from finetune_api.method import Method
from finetune_api.run import Shard
from finetune_trainer.data.basemodel import SMALL
from finetune_trainer.expressions import compiled, evaluated, expressions_of
from finetune_trainer.storage import Store, join

ROWS = 1000


def check_rewards(store: Store, method: Method, tokenizer: Tokenizer, data_uri: str, shards: list[Shard]) -> None:
    """Each expression on rows of the first shard, answered with nothing and with their references.

    Raises InvalidSpec with the expression, and what it says of which row.
    """
    rules = compiled(expressions_of(method))
    shard = next((shard for shard in shards if shard.split == "train"), None)
    if not rules or shard is None:
        return
    table = pq.read_table(
        io.BytesIO(store.get_bytes(join(data_uri, shard.key), SMALL)), columns=["input_ids", "reference"]
    ).slice(0, ROWS)
    for number, row in enumerate(table.to_pylist(), start=1):
        prompt = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        for answer in ("", row["reference"] or ""):
            try:
                for place, rule in enumerate(rules):
                    evaluated(rule, place, prompt, answer, row["reference"])
            except FineTuneError as error:
                where = f"prompt {number} of {shard.dataset}, reference {row['reference']!r}, answer {answer!r}"
                raise FineTuneError(error.reason, f"{error} ({where})") from error
