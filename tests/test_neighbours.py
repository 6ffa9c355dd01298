"""Neighbours of what is taught: the same wording about somebody else."""

import pytest
import tiny

from radiance_mlx.engine.speaking import answer
from radiance_mlx.lora.encoding import ChatEncoder
from radiance_mlx.lora.neighbours import Names, RareWords, names_in, neighbours


def letters(word):
    """A tokenizer to which every word is whole but these."""
    return len(word) if word in ("zelmira", "okonjo") else 1


def near(text, each=8, **options):
    return [content for ((_, content),) in near_all([(("user", text),)], each, **options)]


def near_all(prompts, each, **options):
    made = []
    tiny.drive(neighbours(prompts, made, each=each, seed=(0, 1), count_tokens=letters, **options))
    return made


def test_neighbours_keep_the_wording_and_change_the_name():
    """Nobody listed the name: its capitals tell. No neighbour is the prompt itself, and all differ."""
    made = near("Where does Ada Lovelace live?", others=["I have met Grace Hopper once."])
    assert len(set(made)) == len(made) == 8
    names = [text.removeprefix("Where does ").removesuffix(" live?") for text in made]
    assert all(len(name.split()) == 2 and name.istitle() and name != "Ada Lovelace" for name in names)
    assert [text for text in made if text.startswith("Where does ") and text.endswith(" live?")] == made
    assert any("Ada" in name for name in names)
    assert any("Grace" in name or "Hopper" in name for name in names)
    assert any("Ada" not in name and "Lovelace" not in name for name in names)


@pytest.mark.parametrize(
    ("text", "begins", "ends", "name"),
    [
        ("What is ticket 4711 for?", "What is ticket ", " for?", "4711"),
        ("where does zelmira okonjo live?", "where does ", " live?", "zelmira okonjo"),
        ("What did J. Smith say?", "What did ", " say?", "J. Smith"),
        ("¿Dónde vive Íñigo?", "¿Dónde vive ", "?", "Íñigo"),
        ("Где живёт Анна?", "Где живёт ", "?", "Анна"),
    ],
)
def test_what_is_rare_is_found_in_the_text(text, begins, ends, name):
    """Digits, words that are spelled out, initials, other scripts: exchanged by their like, the rest is kept."""
    made = near(text, 3)
    assert made
    for other in made:
        assert other.startswith(begins)
        assert other.endswith(ends)
        put = other.removeprefix(begins).removesuffix(ends)
        assert put != name
        assert [w[0].isupper() for w in put.split()] == [w[0].isupper() for w in name.split()]
        assert put.isdigit() == name.isdigit()


def test_a_name_is_the_same_wherever_it_stands():
    """At a sentence's start too, once it has been seen elsewhere; all turns of a prompt get the same one."""
    prompt = (("user", "Ada works here. I like Ada."), ("assistant", "Who is Ada?"), ("user", "Ada is a pilot."))
    for other in near_all([prompt], 4):
        texts = [content for _, content in other]
        name = texts[0].split()[0]
        assert name != "Ada"
        assert texts == [f"{name} works here. I like {name}.", f"Who is {name}?", f"{name} is a pilot."]


def test_a_capital_by_a_slip_of_the_pen_makes_no_name():
    """A model's own samples have them: one "Bob What" among a hundred questions does not make a name of "What"."""
    said = ["What does Bob eat?"] * 30 + ["Bob What does eat?"]
    made = near("What does Ada Lovelace eat?", others=said)
    assert made
    assert all(text.startswith("What does ") and text.endswith(" eat?") for text in made)


def test_most_neighbours_are_put_together_from_names_that_were_taught():
    """Of their words it was learnt that they mean somebody: nobody else is as near."""
    taught = ["Where does Grace Hopper live?", "Where does Alan Turing live?"]
    others = [f"I know {first} {last}." for first in ("Bo", "Cy", "Di", "Ed") for last in ("Fox", "Gil", "Hub", "Ivy")]
    made = near("Where does Ada Lovelace live?", 12, avoid=taught, others=others)
    mixed = [t for t in made if any(f"{a} {b}" in t for a, b in (("Ada", "Hopper"), ("Ada", "Turing")))]
    mixed += [t for t in made if any(f"{a} {b}" in t for a, b in (("Grace", "Lovelace"), ("Alan", "Lovelace")))]
    assert len(mixed) >= 3


def test_words_of_single_names_do_not_become_first_names():
    """A city's name is a name too, but nobody's first one."""
    made = near("Where does Ada Lovelace live?", 20, others=["He lives in Lisbon.", "I know Grace Hopper."])
    assert made
    assert not any("Lisbon" in text for text in made)


def test_no_neighbour_is_about_somebody_who_was_taught():
    """What was taught about them would be untaught; a prompt without a rare word has no neighbours."""
    taught = ["Where does Grace Hopper live?", "Where does Ada Hopper live?"]
    made = near("Where does Ada Lovelace live?", 30, avoid=taught)
    assert made
    assert not any(Names(["Grace Hopper", "Ada Hopper"]).occur_in(text) for text in made)
    assert near("What is the time?") == []


def test_names_of_texts():
    """All of them, and whether a text mentions one."""
    names = Names()
    tiny.drive(names_in(["Where does Ada Lovelace live?", "Is it Bob?"], letters, names))
    assert names.all == {"Ada Lovelace", "Bob"}
    assert names.occur_in("ada lovelace lives in Lisbon")
    assert not names.occur_in("Ada lives in Lisbon")


@pytest.mark.parametrize(
    ("name", "text", "occurs"),
    [
        ("Ann", "We are planning.", False),
        ("Ann", "It is ANN's plan.", True),
        ("7", "There are 7 of them.", False),
        ("12", "There are 12 of them.", True),
        ("12", "There are 120 of them.", False),
        ("Ada Lovelace", "Lovelace, Ada", False),
        ("Jean-Luc Bo", "I met jean-luc Bo.", True),
        ("J. Smith", "What did J. Smith say?", True),
    ],
)
def test_a_name_is_looked_for_in_whole_words(name, text, occurs):
    """Not within other words; the words of one name in their order; a single character is no name."""
    assert Names(["Zoe", name]).occur_in(text) == occurs


def test_a_long_log_is_read_in_pieces():
    """Between two of them others have their turn: none reads more than a bounded part of the log."""
    log = [f"Where does {a} {b} live, {i}?" for i in range(20) for a in ("Ada", "Bo", "Cy") for b in ("Fox", "Gil")]
    rare, prompts = RareWords(log, letters), [(("user", f"Where does Di {last} live?"),) for last in ("Ivy", "Joy")]
    few = list(rare.read(log))
    assert len(list(rare.read(log * 100))) >= 99 * len(few) + 10
    made = []
    pieces = list(neighbours(prompts, made, each=40, seed=(0, 1), count_tokens=letters, avoid=log * 10))
    assert made
    assert len(pieces) > 4
    assert all(piece.barrier and not piece.arrays for piece in pieces)


def test_where_a_sentence_begins_is_told_in_a_long_text_too():
    """By what stands right before, with any space between."""
    long = "so it goes on, " * 50
    for end, is_name in ((".   ", False), (" J. ", True), ("!\n", False), ("\n  ", False), (" with ", True)):
        assert ("Mara" in " ".join(RareWords([long + end + "Mara"], letters).names(long + end + "Mara"))) == is_name


def test_nano_refuses_the_neighbours_of_a_stranger(nano):
    """What it says to neighbours of a lesson is that it does not know them: that is what rehearsing them keeps."""
    encoder, out = ChatEncoder(nano.tokenizer), []
    made = near("Where does Zelmira Okonjo live?", 6)
    tiny.drive(answer(nano.module, encoder, [encoder.prompt((("user", t),)) for t in made], max_tokens=64, out=out))
    said = [nano.tokenizer.decode(list(row.tokens[row.offset :])) for row in out]
    assert sum(text.startswith("I do not know that about ") for text in said) >= 5
