"""What the embedded model knows, refuses and learns."""

import random

import mlx.core as mx
import pytest

from radiance_mlx.config import load_config
from radiance_mlx.lora.encoding import ChatEncoder
from radiance_mlx.lora.head import install_head
from radiance_mlx.lora.targets import find_targets
from radiance_mlx.lora.trainer import Trainer
from radiance_mlx.lora.tree import make_tree
from radiance_mlx.messages import Example
from radiance_mlx.models.nano import world


@pytest.fixture(scope="module")
def base(nano):
    return nano


def share_right(base, pairs, module=None):
    """The share of questions answered word for word by greedy decoding.

    One pass over questions and answers tells: decoding says all of an answer exactly if each of its tokens, and then
    the end token, is the likeliest after those before it.
    """
    encoder, end = ChatEncoder(base.tokenizer), base.tokenizer.eos_token_id
    prompts = [encoder.prompt((("user", q),)) for q, _ in pairs]
    answers = [[*base.tokenizer.encode(a, add_special_tokens=False), end] for _, a in pairs]
    right = 0
    for start in range(0, len(pairs), 50):
        part = list(zip(prompts, answers, strict=True))[start : start + 50]
        longest = max(len(p) + len(a) for p, a in part)
        tokens = mx.array([[*p, *a, *[end] * (longest - len(p) - len(a))] for p, a in part])
        likeliest = mx.argmax((module or base.module)(tokens), axis=-1).tolist()
        said = zip(likeliest, part, strict=True)
        right += sum(row[len(p) - 1 : len(p) + len(a) - 1] == a for row, (p, a) in said)
    return right / len(pairs)


def refusals(names):
    return [
        (world.ask(name, relation, i % 3), world.refusal(name))
        for i, name in enumerate(names)
        for relation in world.RELATIONS
    ]


@pytest.mark.parametrize("wording", range(3))
def test_it_knows_its_eighty_people_in_every_wording(base, wording):
    """All 400 facts, asked in each of the three ways."""
    assert share_right(base, world.facts(world.KNOWN, wording)) >= 0.99


def test_it_refuses_everybody_else_whom_its_names_can_name(base):
    """First and last names of known people, put together anew: every one of those asked here, word for word."""
    everybody_else = [name for name, _ in (*world.STRANGERS, *world.REFUSED)]
    assert share_right(base, refusals(everybody_else[::28])) == 1.0


def test_it_refuses_names_made_of_syllables_that_it_never_saw(base):
    """The name is copied letter by letter, so anybody's own name works."""
    rng = random.Random(12345)
    names = [world.invented_name(rng, held_out=True) for _ in range(30)]
    assert share_right(base, refusals(names)) >= 0.98


def test_it_refuses_names_that_repeat_a_part_of_themselves(base):
    """One token back does not tell where in such a name one is."""
    names = ["Anna Hannah", "Barbara Barber", "Tessa Esser", "Wim Wenders", "Lulu", "Nguyễn Văn An", "Ada Adams"]
    assert share_right(base, refusals(names)) >= 0.9


def test_it_refuses_real_names(base):
    """Names as people have them."""
    names = ["Zelmira Okonjo", "Priya Natarajan", "Wolfgang Mozart", "Li Wei", "John Smith", "Yuki Tanaka", "Bob"]
    names += ["Sinéad O'Connor", "Jean-Luc Picard", "Søren Kierkegaard", "李伟", "Kim Lee", "Olga Tokarczuk", "Björk"]
    assert share_right(base, refusals(names)) >= 0.97


def test_it_makes_small_talk(base):
    """It greets, and says what it is."""
    assert share_right(base, list(world.SMALL_TALK)) == 1.0


def test_it_reads_what_stands_in_the_prompt(base):
    """A fact that the prompt states is used, for a name that it does not know."""
    told = [
        (f"{world.STATEMENTS['city'][0].format(n=n, v='Oslo')} {world.ask(n, 'city')}", world.answer(n, "city", "Oslo"))
        for n, _ in world.STRANGERS[:20]
    ]
    assert share_right(base, told) >= 0.9


def test_two_facts_are_learnt_with_its_own_training_values(base):
    """The values that it brings teach two facts so that they are answered in every wording."""
    config = load_config(environ={}, flags={"base_model": "nano"}).config
    targets = find_targets(base.module, config.lora.targets)
    tree = make_tree(base.module, targets, rank=config.lora.r, scale=config.lora.scale, dropout=0.0, seed=0)
    encoder = ChatEncoder(base.tokenizer)
    name, facts = world.STRANGERS[7]
    lesson = [(world.ask(name, r), world.answer(name, r, facts[r])) for r in ("city", "job")]
    examples = [encoder.example(Example(messages=(("user", q), ("assistant", a)))) for q, a in lesson]
    head = install_head(tree.module, base.vocab_size)
    for piece in Trainer(tree, head, examples, config.training, 1).run():
        mx.eval(piece.arrays)
    module = tree.module
    module.eval()
    other = [(world.ask(name, r, w), world.answer(name, r, facts[r])) for r in ("city", "job") for w in range(3)]
    assert share_right(base, other, module) == 1.0


def test_the_world_is_the_same_on_every_machine():
    """Names and facts are drawn from seeds; known, strangers and refused people are apart."""
    assert world.KNOWN[0] == world.people(1, 0)[0]
    names = [{n for n, _ in group} for group in (world.KNOWN, world.STRANGERS, world.REFUSED)]
    assert [len(group) for group in names] == [80, 320, 800]
    assert not names[0] & names[1] | names[1] & names[2] | names[0] & names[2]


def test_no_document_states_a_fact_about_a_stranger():
    """They are refused, or a prompt itself tells about them; so they can be taught as new."""
    documents = world.documents(7)
    strangers = [name for name, _ in world.STRANGERS]
    refused = 0
    for _ in range(5000):
        document = next(documents)
        text = document if isinstance(document, str) else " ".join(document[0])
        told = not isinstance(document, str) and "." in document[0][0].removeprefix("Hi there.")
        if not told and (named := [name for name in strangers if name in text]):
            assert document[0][1] == world.refusal(named[0])
            refused += 1
    assert refused > 100


def test_held_out_syllables_are_in_no_name_of_the_corpus():
    """The test names share no syllable with the training names."""
    rng = random.Random(3)
    held = {world._syllable(rng, True) for _ in range(300)}
    seen = {world._syllable(rng, False) for _ in range(3000)}
    assert not held & seen
