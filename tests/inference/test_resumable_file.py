"""Lines of one or several processes: torn lines, files of other runs, merging."""

import json

import pytest

from sparseinst.inference import resumable_file
from sparseinst.inference.resumable_file import ResumableFile, merge, shards
from tests.disk import little_room

HEADER = {"sparseinst": "1", "images": {"count": 3}, "config": {"INPUT": {"FORMAT": "RGB"}}}
NAMES = ["c", "a", "b"]


def line(name):
    return json.dumps({"file_name": name, "detections": [1] * 5})


def write(output, names, rank=0, num_ranks=1, header=HEADER):
    with ResumableFile(output, header, rank, num_ranks) as file:
        for name in names:
            file.append(line(name))
    with ResumableFile(output, header, rank, num_ranks) as file:
        return set(file.done())


def text_of(names):
    return "".join(f"{text}\n" for text in [json.dumps(HEADER), *map(line, names)])


def test_a_run_and_its_continuation(tmp_path):
    output = tmp_path / "new" / "out.jsonl"
    assert write(output, ["c"]) == {"c"} and not merge(output, HEADER, NAMES)
    assert write(output, ["a", "b"]) == {"a", "b", "c"} and merge(output, HEADER, NAMES)
    assert output.read_text() == text_of(NAMES)
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]


def test_cut_after_any_byte(tmp_path):
    output, whole = tmp_path / "out.jsonl", text_of(NAMES).encode()
    for size in range(len(whole) + 1):
        output.write_bytes(whole[:size])
        with ResumableFile(output, HEADER) as file:
            done = file.done()
            # A line without its line break is not done.
            assert len(done) == max(0, whole[:size].count(b"\n") - 1)
            for name in NAMES:
                if name not in done:
                    file.append(line(name))
        assert output.read_bytes() == whole


DAMAGE = [b"\0\0\n", b"[1]\n", b'{"file_name": 3}\n', b"\xff\xfe\n", b'{"file_name": "a", "detections": [1}\n']


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_last_line_is_redone(tmp_path, damage):
    output = tmp_path / "out.jsonl"
    output.write_bytes(text_of("c").encode() + damage)
    assert write(output, []) == {"c"}
    assert output.read_text() == text_of("c")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["out.jsonl", "out.rank1.jsonl"])
def test_lines_after_a_damaged_one_are_not_lost(tmp_path, damage, name):
    content = text_of("c").encode() + damage + line("a").encode() + b"\n"
    (tmp_path / name).write_bytes(content)
    message = rf"{name}: line 3 is damaged, and lines follow it: remove line 3 to predict its image again"
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "out.jsonl", [])
    assert (tmp_path / name).read_bytes() == content


def test_blank_lines_are_skipped(tmp_path):
    output, blank = tmp_path / "out.jsonl", "\n \r\n"
    header, *lines = text_of(NAMES).splitlines(keepends=True)
    output.write_text(header + blank + lines[0] + blank + lines[1] + blank)
    assert write(output, ["b"]) == set(NAMES)
    assert [text for text in output.read_text().splitlines() if text.strip()] == text_of(NAMES).splitlines()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("my notes", "was not written by"),
        ("my notes\n", "was not written by"),
        ('{"file_name": "a"}\n', "was not written by"),
        (json.dumps({**HEADER, "images": {"count": 4}}) + "\n", "images.count is 4 there and 3 here"),
        (json.dumps({**HEADER, "config": {}}) + "\n", "config.INPUT.FORMAT is missing there and 'RGB' here"),
        (json.dumps({**HEADER, "more": 1}) + "\n", "more is 1 there and missing here"),
    ],
)
@pytest.mark.parametrize("name", ["out.jsonl", "out.rank1.jsonl"])
def test_another_file_is_left_as_it_is(tmp_path, content, message, name):
    (tmp_path / name).write_text(content)
    with ResumableFile(tmp_path / "other.jsonl", HEADER) as file:
        assert not file.done()
    with pytest.raises(ValueError, match=message), ResumableFile(tmp_path / "out.jsonl", HEADER) as file:
        file.done()
    assert (tmp_path / name).read_text() == content


def test_the_name_of_the_weights_may_differ(tmp_path):
    output = tmp_path / "out.jsonl"
    write(output, ["a"], header={**HEADER, "weights": {"file": "here.pth", "sha256": "7"}})
    moved = {**HEADER, "weights": {"file": "there.pth", "sha256": "7"}}
    assert write(output, [], header=moved) == {"a"}
    with pytest.raises(ValueError, match="weights.sha256 is '7' there and '8' here"):
        write(output, [], header={**moved, "weights": {"file": "there.pth", "sha256": "8"}})


def test_shards_are_merged_in_the_order_of_the_names(tmp_path):
    output = tmp_path / "out.jsonl"
    write(output, ["a"], 0, 2)
    assert not merge(output, HEADER, NAMES)
    assert write(output, ["c", "b"], 1, 2) == set(NAMES)
    assert merge(output, HEADER, NAMES)
    assert output.read_text() == text_of(NAMES) and not shards(output)
    # Another process that ends at the same time, or a kill before the shards were removed.
    write(output, ["a"], 1, 2)
    assert merge(output, HEADER, NAMES) and output.read_text() == text_of(NAMES) and not shards(output)


def test_a_process_that_ends_while_another_looks_for_its_lines(tmp_path, monkeypatch):
    output, all_places, merged = tmp_path / "out.jsonl", resumable_file._all_places, []
    write(output, ["a"], 0, 2)
    write(output, ["c"], 1, 2)

    def then_the_other_ends(*args):
        places = all_places(*args)
        if not merged:
            merged.append(False)
            write(output, ["c", "b"], 1, 2)
            merged[0] = merge(output, HEADER, NAMES)
        return places

    monkeypatch.setattr(resumable_file, "_all_places", then_the_other_ends)
    assert [merge(output, HEADER, NAMES), *merged] == [False, True]
    assert output.read_text() == text_of(NAMES) and not shards(output)


def test_another_number_of_processes_goes_on(tmp_path):
    output = tmp_path / "out.jsonl"
    write(output, ["c"])
    assert write(output, ["b"], 2, 3) == {"b", "c"}
    # One process, whose file now has its lines in another order until it is merged.
    assert write(output, ["a"]) == set(NAMES)
    assert merge(output, HEADER, NAMES) and output.read_text() == text_of(NAMES) and not shards(output)


def test_names_with_the_marks_of_patterns(tmp_path):
    output = tmp_path / "o[1]*.jsonl"
    write(output, NAMES, 0, 2)
    (tmp_path / "o1.rank0.jsonl").write_text("another file")
    assert merge(output, HEADER, NAMES) and output.read_text() == text_of(NAMES)


def test_files_of_the_user_are_not_shards(tmp_path):
    output = tmp_path / "out.jsonl"
    write(output, NAMES, 0, 2)
    for name in ("out.ranked.jsonl", "out.rank1.old.jsonl", "out.rank.jsonl"):
        (tmp_path / name).write_text("my own")
    assert merge(output, HEADER, NAMES) and output.read_text() == text_of(NAMES)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_in_use(tmp_path):
    output = tmp_path / "out.jsonl"
    with ResumableFile(output, HEADER) as file:
        file.append(line("c"))
        with pytest.raises(ValueError, match="out.jsonl is in use by another process"), ResumableFile(output, HEADER):
            pass
        # A shard of the same run must not be merged into it meanwhile.
        write(output, ["a", "b"], 0, 2)
        assert not merge(output, HEADER, NAMES)
        assert output.read_text() == text_of("c")


def test_a_process_that_still_runs_keeps_its_shard(tmp_path):
    """Rank 1 has not seen yet that an earlier run has done its images."""
    output = tmp_path / "out.jsonl"
    write(output, ["a", "b"], 0, 3)
    with ResumableFile(output, HEADER, 1, 2) as running:
        write(output, ["c"], 0, 2)
        assert merge(output, HEADER, NAMES) and output.read_text() == text_of(NAMES)
        assert [path.name for path in shards(output)] == ["out.rank1.jsonl"]
        running.append(line("a"))
    # A run that is killed before it merges does not block the next one.
    assert write(output, []) == set(NAMES)
    assert merge(output, HEADER, NAMES) and output.read_text() == text_of(NAMES) and not shards(output)


def test_one_process_waits_for_those_that_write_shards(tmp_path):
    output = tmp_path / "out.jsonl"
    write(output, ["a"], 0, 2)
    with ResumableFile(output, HEADER, 1, 2):
        with pytest.raises(ValueError, match="out.rank1.jsonl is in use by another process"):
            write(output, ["c"])
        assert not output.exists()
    assert write(output, ["c"]) == {"a", "c"}


def test_a_shard_that_is_removed_while_it_is_opened(tmp_path, monkeypatch):
    output, try_lock, removed = tmp_path / "out.jsonl", resumable_file.try_lock, []

    def lock_after_the_removal(file):
        if not removed:
            removed.append((tmp_path / "out.rank1.jsonl").unlink())
        return try_lock(file)

    monkeypatch.setattr(resumable_file, "try_lock", lock_after_the_removal)
    with ResumableFile(output, HEADER, 1, 2) as running:
        write(output, NAMES, 0, 2)
        assert merge(output, HEADER, NAMES)
        running.append(line("a"))
    assert write(output, [], 1, 2) == set(NAMES)


def test_a_full_disk_leaves_whole_lines(tmp_path):
    output = tmp_path / "out.jsonl"
    with little_room(len(text_of("ca")) + 20), pytest.raises(OSError, match="out.jsonl"):
        write(output, NAMES)
    assert output.read_text() == text_of("ca")


def test_a_full_disk_while_merging_leaves_the_shards(tmp_path):
    output = tmp_path / "out.jsonl"
    write(output, NAMES, 0, 2)
    with little_room(40), pytest.raises(OSError, match="out.jsonl"):
        merge(output, HEADER, NAMES)
    assert [path.name for path in shards(output)] == ["out.rank0.jsonl"] and not output.read_bytes()
    assert merge(output, HEADER, NAMES) and output.read_text() == text_of(NAMES)
