"""What keeps a pod from publishing what is torn, another's or already there: as `guards` is for the operator."""

from faults.guards import Guard

TRAINER = "trainer_image/finetune_trainer"
FENCING, CALLS, BYTES = (f"tests/faults/test_s3_{name}.py" for name in ("fencing", "calls", "bytes"))
LATE = f"{FENCING}::test_a_pod_that_comes_back_late_publishes_nothing"

GUARDS = (
    Guard(
        "a later attempt fences the earlier ones",
        f"{TRAINER}/fence.py",
        "entry = known or self._write(earlier, Entry(fenced=self.attempt))",
        "entry = known or Entry(fenced=self.attempt)",
        (LATE,),
    ),
    Guard(
        "an attempt publishes through its register",
        f"{TRAINER}/output.py",
        "fence.commit if fence else None",
        "None",
        ("tests/integration/test_train_fencing.py::test_a_gang_that_comes_back_late_publishes_nothing",),
    ),
    Guard(
        "what an earlier attempt published is the job's result",
        f"{TRAINER}/fence.py",
        "            if entry.fenced is None:\n                return self._roll_forward(entry)",
        "            if entry.fenced is None:\n                continue",
        (f"{FENCING}::test_what_an_attempt_had_published_is_the_next_ones_result",),
    ),
    Guard(
        "a register is written once",
        f"{TRAINER}/storage.py",
        'self._put(uri, data, IfNoneMatch="*")',
        "self._put(uri, data)",
        ("tests/integration/test_storage.py::test_of_many_writers_of_one_key_one_wins",),
    ),
    Guard(
        "the manifest is written last",
        f"{TRAINER}/publish.py",
        '    with ThreadPoolExecutor(FILES_AT_ONCE, "publish") as pool:',
        "    told = [FileEntry(key=p.relative_to(directory).as_posix(), size=p.stat().st_size, sha256=sha256_of(p))"
        " for p in paths]\n"
        "    first = Manifest(kind=kind, step=step, created_time=created_time, files=told, run=run)\n"
        "    store.put_if_absent(join(uri, MANIFEST_KEY), encode_manifest(first))\n"
        '    with ThreadPoolExecutor(FILES_AT_ONCE, "publish") as pool:',
        (f"{CALLS}::test_what_lasts_ends_in_one_sentence_and_can_be_made_good[publish]",),
    ),
    Guard(
        "what is fetched is verified",
        f"{TRAINER}/storage.py",
        "if expected is not None and found != expected:",
        "if False:",
        (f"{BYTES}::test_every_damaged_byte_is_noticed",),
    ),
    Guard(
        "an upload that nobody knows is looked for",
        f"{TRAINER}/storage.py",
        'if self._retries.repeated["CreateMultipartUpload"] > begun:',
        "if False:",
        ("tests/faults/test_s3_trouble.py::test_an_upload_whose_beginning_was_not_answered_leaves_none_behind",),
    ),
    Guard(
        "a store that fails is asked again",
        f"{TRAINER}/retries.py",
        "if isinstance(caught_exception, BROKEN) or is_passing(status, code) or code in RETRYABLE_CODES:",
        "if False:",
        (f"{CALLS}::test_what_passes_is_got_over[publish]",),
    ),
)
