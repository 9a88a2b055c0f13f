"""What is kept in memory is what was used last, and no more bytes than were allowed."""

from storage.kept import Kept


def kept(at_most: int) -> Kept[str, bytes]:
    return Kept(at_most, len)


def test_what_was_not_used_for_longest_goes_first():
    some = kept(10)
    for name in "abc":
        some.put(name, bytes(3))
    some.get("a")

    some.put("d", bytes(4))

    assert [name for name in "abcd" if some.get(name) is not None] == ["a", "c", "d"]


def test_a_value_that_is_put_again_counts_once():
    some = kept(10)
    for _ in range(5):
        some.put("a", bytes(4))

    some.put("b", bytes(6))

    assert (some.get("a"), some.get("b")) == (bytes(4), bytes(6))


def test_what_is_forgotten_makes_room():
    some = kept(10)
    some.put("a", bytes(6))
    some.put("b", bytes(4))
    some.drop("a")
    some.drop("never there")

    some.put("c", bytes(6))

    assert some.get("a") is None
    assert (some.get("b"), some.get("c")) == (bytes(4), bytes(6))


def test_the_last_one_is_kept_however_large():
    some = kept(10)
    some.put("a", bytes(3))

    some.put("b", bytes(30))

    assert some.get("a") is None
    assert some.get("b") == bytes(30)
