"""The files of values: what we write prometheus_client reads, and what is damaged is found to be, whatever it is."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from preforkd_workers.valuefile import LIVE, SHORTEST, Damaged, ValueFile, entries, kind_of, name_of


def key(name: str, help_text: str = "Help.") -> str:
    return mmap_key(name, name, ["label"], ["värde"], help_text)


def write(path: Path, values: dict[str, float]) -> ValueFile:
    file = ValueFile(str(path))
    for name, value in values.items():
        at = file.place(name)
        file.words[at] = value
    return file


def sound(tmp_path: Path, number: int) -> bytes:
    write(tmp_path / "counter_a-0.db", {key(f"name{n}"): float(n) for n in range(number)})
    return (tmp_path / "counter_a-0.db").read_bytes()


@pytest.mark.parametrize("number", [0, 1, 7, 1000])
def test_the_library_reads_what_we_write(tmp_path: Path, number: int) -> None:
    values = {key("n" * n): float(n) for n in range(1, number + 1)}  # of every length, for the padding
    path = tmp_path / "counter_a-0.db"
    write(path, values)
    found = MmapedDict.read_all_values_from_file(str(path))  # type: ignore[no-untyped-call]
    read = {name: value for name, value, *_ in found}
    assert read == values
    assert len([*MultiProcessCollector.merge([str(path)])]) == number  # type: ignore[no-untyped-call]
    assert len([*entries(path.read_bytes())]) == number


def test_the_next_writer_goes_on_although_the_text_is_another(tmp_path: Path) -> None:
    path = tmp_path / "counter_a-0.db"
    write(path, {key("one"): 1.0})
    file = ValueFile(str(path))
    at = file.place(key("one", "Another help."))
    assert file.words[at] == 1.0
    assert not file.damage


def test_a_file_appears_as_a_whole_with_all_its_bytes_allocated(tmp_path: Path) -> None:
    ValueFile(str(tmp_path / "counter_a-0.db"))
    (made,) = tmp_path.iterdir()
    assert made.stat().st_size == SHORTEST <= made.stat().st_blocks * 512


def test_a_file_that_was_half_made_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "counter_a-0.db.new").write_bytes(b"half")
    assert not write(tmp_path / "counter_a-0.db", {key("one"): 1.0}).damage
    assert [file.name for file in tmp_path.iterdir()] == ["counter_a-0.db"]


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    whole = sound(tmp_path, 20)
    used = int.from_bytes(whole[:4], "little")
    for length in range(used):
        with pytest.raises(Damaged):
            list(entries(whole[:length]))
    assert len([*entries(whole[:used])]) == 20


@given(st.binary(max_size=400), st.integers(0, 400))
def test_garbage_is_either_read_or_found_to_be_damaged(data: bytes, used: int) -> None:
    for each in (data, used.to_bytes(4, "little") + bytes(4) + data):
        try:
            found = [*entries(each)]
        except Damaged:
            continue
        assert all(at * 8 + 16 <= len(each) for _, at in found)


@pytest.mark.parametrize("service", ["a", "my_app", "x-1", "päron/%", "a.b_c@d:e"])
def test_the_library_finds_kind_and_slot_in_the_name(tmp_path: Path, service: str) -> None:
    for kind in ("counter", "histogram", *LIVE):
        name = name_of(kind, service, 12)
        assert kind_of(name) == kind
        assert len(name.split("_")) == kind.count("_") + 2
        assert name.endswith("-12.db")


def test_no_two_services_have_a_name_in_common() -> None:
    services = ["a_b", "a-b", "a%5Fb", "a", "b", "a-0", "a.b"]
    assert len({name_of("counter", service, 1) for service in services}) == len(services)
