"""What may be wrong with data, models and adapters, and the test that holds its message: one table for readers."""

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

TESTS = Path(__file__).parents[1]
FILE = "integration/test_prepare_refusals.py::test_a_bad_file_is_named_with_its_line"
SPEC = "integration/test_prepare_refusals.py::test_a_bad_reference_is_named_with_its_field"
MODEL = "integration/test_prepare_refusals.py::test_a_bad_model_is_named_with_its_file"
REFUSAL = "integration/test_prepare_refusals.py::"
ADAPTER = "integration/test_prepare_adapter.py::"
READER = "unit/test_data_readers.py::"
PREPARE = "integration/test_prepare.py::"
STREAM = "integration/test_train_streaming.py::"
ATTACKS = "integration/test_prepare_attacks.py::"
BAD_MODEL = f"{ATTACKS}test_a_model_that_breaks_a_library_is_refused"
BAD_FILE = f"{ATTACKS}test_a_file_that_breaks_a_library_is_refused"
BAD_TEMPLATE = f"{ATTACKS}test_a_template_that_does_harm_is_refused"
BOMB = f"{READER}test_a_bomb_takes_little_time_and_memory"
RENDERING = "unit/test_template_attacks.py::test_a_rendering_ends_in_time_and_takes_little_memory"

BROKEN = {
    # Files of data
    "a byte order mark": f"{PREPARE}test_a_byte_order_mark_is_no_part_of_the_first_row",
    "UTF-16": f"{FILE}[UTF-16]",
    "UTF-16 without a mark": f"{FILE}[UTF-16 without a mark]",
    "a CSV in UTF-16": f"{FILE}[a CSV in UTF-16]",
    "Latin-1": f"{FILE}[another encoding]",
    "a CSV in Latin-1": f"{FILE}[a CSV in Latin-1]",
    "half of a surrogate pair": f"{FILE}[half a character]",
    "a noncharacter that is reserved": f"{FILE}[a text that reserves our marks]",
    "a truncated gzip file": f"{FILE}[a cut gzip]",
    "a truncated zstd file": f"{FILE}[a cut zstd]",
    "a truncated parquet file": f"{FILE}[a cut parquet file]",
    "a file that is not gzip": f"{FILE}[no gzip]",
    "a zip archive": f"{FILE}[a zip archive]",
    "a file that is not parquet": f"{FILE}[no parquet]",
    "a gzip bomb": f"{FILE}[a bomb of empty lines]",
    "a zstd bomb": f"{FILE}[a bomb in zstd]",
    "a line of 1 GB": f"{READER}test_of_a_line_of_a_gigabyte_only_the_beginning_is_read",
    "a line without end in gzip": f"{FILE}[an endless line in gzip]",
    "a field without end": f"{FILE}[an endless field of a CSV]",
    "a quote that is never closed": f"{FILE}[a quote that is never closed]",
    "a pointer of Git LFS": f"{FILE}[a pointer of Git LFS]",
    "a web page": f"{FILE}[a web page]",
    "a pretty JSON array": f"{FILE}[a pretty JSON array]",
    "an unknown kind of file": f"{FILE}[an unknown kind]",
    "an empty file": f"{FILE}[an empty file]",
    "a gzip file of many members": f"{BAD_FILE}[a gzip file of many members]",
    "long lines in gzip": f"{BOMB}[long lines]",
    "a long line in zstd": f"{BOMB}[a long line in zstd]",
    "empty lines without end": f"{READER}test_empty_lines_without_end_are_refused",
    "a CSV of a million columns": f"{BAD_FILE}[a CSV of a million columns]",
    "a row of a CSV without end": f"{READER}test_a_row_of_a_csv_over_many_lines_is_bounded",
    "a parquet file of many columns": f"{BAD_FILE}[more columns than there can be]",
    "a parquet file of rows of nothing": f"{BAD_FILE}[rows of nothing]",
    "a parquet page that lies": f"{BOMB}[a value of a page that lies]",
    "a value that a parquet file repeats": f"{BOMB}[a value that is repeated]",
    "two parquet columns of one name": f"{BAD_FILE}[two columns of one name]",
    "a prefix of too many objects": f"{ATTACKS}test_a_prefix_of_too_many_objects_is_refused",
    # Rows
    "a reference of half a character": f"{BAD_FILE}[half a character in a reference]",
    "a column's name of half a character": f"{BAD_FILE}[half a character in a column's name]",
    "an integer of a million digits": f"{BAD_FILE}[an integer of a million digits]",
    "a million keys": f"{BAD_FILE}[a million keys]",
    "lists without end": f"{BOMB}[a pattern of lists]",
    "deep JSON in a text": f"{BAD_FILE}[tools that are deep]",
    "parquet text that is not UTF-8": f"{BAD_FILE}[text of parquet that is not UTF-8]",
    "a date that Python does not know": f"{BAD_FILE}[a date before all dates]",
    # Templates
    "a template that runs for ever": f"{BAD_TEMPLATE}[a macro that calls itself twice]",
    "a template that fills the memory": f"{BAD_TEMPLATE}[a text that doubles]",
    "a template of an unknown codec": f"{BAD_TEMPLATE}[an unknown codec]",
    "a template of many parentheses": f"{BAD_TEMPLATE}[many parentheses]",
    "a loop that calls itself": f"{RENDERING}[a loop that is called in itself]",
    "a set block that doubles": f"{RENDERING}[a set block]",
    "a width": f"{RENDERING}[a width]",
    "lists that hold the same lists": f"{RENDERING}[lists that hold the same lists]",
    "invalid JSON": f"{FILE}[invalid JSON]",
    "a key that stands twice": f"{FILE}[a key that stands twice]",
    "deep nesting": f"{FILE}[deep nesting]",
    "a row that is a list": f"{FILE}[a list]",
    "a number in place of text": f"{FILE}[a wrong type]",
    "bytes in place of text": f"{FILE}[a parquet file of bytes]",
    "NaN in place of text": f"{FILE}[a number that is none]",
    "null in place of text": f"{FILE}[nothing where text should be]",
    "a missing column": f"{FILE}[a missing column]",
    "an empty answer": f"{FILE}[an empty answer]",
    "a CSV line with too few fields": f"{FILE}[a short CSV line]",
    "two columns of one name": f"{FILE}[a CSV without names]",
    "semicolons in place of commas": f"{REFUSAL}test_columns_that_fit_no_format_are_told",
    "columns of two formats": f"{REFUSAL}test_columns_that_fit_two_formats_are_not_guessed",
    "an unknown role": f"{FILE}[a strange role]",
    "roles out of order": f"{FILE}[roles out of order]",
    "a conversation without an answer": f"{FILE}[conversations without an answer]",
    "a conversation without turns": f"{FILE}[a conversation without turns]",
    "a turn without words": f"{FILE}[a turn without words]",
    "special tokens in text": f"{PREPARE}test_special_tokens_in_rows_are_text_and_told",
    # The whole of the data
    "fewer rows than ranks": f"{SPEC}[fewer rows than processes]",
    "rows that are all too long": f"{SPEC}[too few rows]",
    "duplicates": f"{REFUSAL}test_duplicates_can_fail_the_job",
    "leakage into the validation data": f"{SPEC}[leakage]",
    "validation and test data that share rows": f"{PREPARE}test_validation_and_test_data_must_not_share_rows",
    "a template that names no column": f"{SPEC}[a template with an unknown column]",
    "a prefix without data": f"{SPEC}[no data in a prefix]",
    "an object that is missing": f"{SPEC}[a missing key]",
    "a bucket that is denied": f"{SPEC}[a denied bucket]",
    # Prepared data
    "a prepared shard that was overwritten": f"{STREAM}test_a_shard_that_was_overwritten_is_named",
    "a prepared shard that is gone": f"{STREAM}test_a_shard_that_is_gone_is_named",
    # Models
    "pickled weights": f"{MODEL}[pickles]",
    "auto_map": f"{MODEL}[code of its own]",
    "a shard of weights that is missing": f"{MODEL}[a shard that is missing]",
    "overlapping safetensors offsets": f"{MODEL}[overlapping tensors]",
    "weights that are cut off": f"{MODEL}[weights that are cut off]",
    "weights that are a pointer of Git LFS": f"{MODEL}[weights that are a pointer of Git LFS]",
    "weights of integers": f"{MODEL}[weights of integers]",
    "a vocabulary that is too small": f"{MODEL}[a smaller vocabulary]",
    "an embedding of another size": f"{MODEL}[an embedding of another size]",
    "weights that are quantised already": f"{MODEL}[quantised weights]",
    "an encoder": f"{MODEL}[an encoder]",
    "no tokeniser": f"{MODEL}[no tokenizer]",
    "a broken tokeniser": f"{MODEL}[a broken tokenizer]",
    "a broken chat template": f"{MODEL}[a broken chat template]",
    "no end of sequence": f"{MODEL}[no end of sequence]",
    "a chat template that runs for ever": f"{BAD_MODEL}[a chat template that calls itself twice]",
    "a chat template of 3,000 parentheses": f"{BAD_MODEL}[a chat template of 3,000 parentheses]",
    "a chat template that is a number": f"{BAD_MODEL}[a chat template that is a number]",
    "a normalizer that makes a gigabyte of a letter": f"{BAD_MODEL}[a normalizer that makes a gigabyte of a letter]",
    "a pattern that looks back without end": f"{BAD_MODEL}[a pattern that looks back without end]",
    "merges of tokens that are missing": f"{BAD_MODEL}[merges of tokens that are missing]",
    "a special token of half a character": f"{BAD_MODEL}[an end of half a character]",
    "a negative width of a head": f"{BAD_MODEL}[a negative width of a head]",
    "a vocabulary of 400 digits": f"{BAD_MODEL}[a vocabulary of 400 digits]",
    "a billion of layers": f"{BAD_MODEL}[a billion of layers]",
    "a width that is NaN": f"{BAD_MODEL}[a width that is NaN]",
    "a flag that is a text": f"{BAD_MODEL}[a flag that is a text]",
    "a config that is deep": f"{BAD_MODEL}[a config that is deep]",
    "a safetensors header that is deep": f"{BAD_MODEL}[a header that is deep]",
    "a safetensors header that says it is large": f"{BAD_MODEL}[a header that says it is large]",
    # Adapters
    "an adapter of another base model": f"{ADAPTER}test_an_adapter_of_another_model_is_refused",
    "an adapter of another kind": f"{ADAPTER}test_another_tuning_is_refused",
    "a pickled adapter": f"{ADAPTER}test_pickles_are_refused",
    "an adapter that is not its manifest's": f"{ADAPTER}test_a_manifest_is_held_to",
}


@cache
def module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"broken_{Path(path).stem}", TESTS / path)
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("test", BROKEN.values(), ids=BROKEN.keys())
def test_each_has_its_test(test: str) -> None:
    path, _, name = test.partition("::")
    name, _, case = name.partition("[")
    found = getattr(module(path), name)
    marks = [mark for mark in getattr(found, "pytestmark", ()) if mark.name == "parametrize"]
    assert not case or case.removesuffix("]") in {i for mark in marks for i in mark.kwargs["ids"]}


def test_no_two_are_the_same() -> None:
    assert len(set(BROKEN.values())) == len(BROKEN) >= 30
