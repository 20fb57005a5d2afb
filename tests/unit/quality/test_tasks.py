"""Text tasks: the generated rule, labels and padding, datasets that do not suit, and scores against truths by hand."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn

from peft_gauge.errors import GaugeError
from peft_gauge.quality import tasks
from peft_gauge.quality.examples import (
    MASKED,
    Encoded,
    calendar_examples,
    collate,
    encode,
    load_examples,
    padding,
)
from peft_gauge.quality.tasks import PreparedText, TextTask, score, split
from peft_gauge.quality.training import Schedule, train
from peft_gauge.training import methods, models

if TYPE_CHECKING:
    from peft_gauge.training.methods import Method


class Characters:
    """A tokenizer of one token a character."""

    def __init__(self, eos: int | None = 2, pad: int | None = None, bos: int | None = None) -> None:
        self.eos_token_id, self.pad_token_id, self.bos_token_id = eos, pad, bos
        self.eos_token, self.chat_template = "", None

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(character) % 250 for character in text]}


def encoded(example: dict[str, str], tokenizer: Characters | None = None, **options: Any) -> Encoded:
    return encode(example, tokenizer or Characters(), **options)


# --- the generated task ---------------------------------------------------------------------------------------


def test_the_calendar_follows_its_rule() -> None:
    examples = {example["prompt"]: example["response"] for example in calendar_examples(28 * 12 * 100, 0)}

    assert len(examples) == 33_600
    assert examples["17 March 2041 in Orvan:"] == " 17 tavek 14"
    assert examples["1 January 2000 in Orvan:"] == " 1 brim 00"
    assert examples["28 December 2007 in Orvan:"] == " 28 zaney 70"


def test_the_calendar_is_drawn_by_its_seed() -> None:
    first = calendar_examples(50, 1)
    assert first["prompt"] == calendar_examples(50, 1)["prompt"]
    assert first["prompt"] != calendar_examples(50, 2)["prompt"]
    assert len(set(first["prompt"])) == 50
    with pytest.raises(GaugeError, match="33601"):
        calendar_examples(33_601, 0)


# --- tokens and labels ----------------------------------------------------------------------------------------


def test_the_prompt_is_given_and_the_answer_is_learned_with_its_end() -> None:
    example = encoded({"prompt": "ab", "response": "cd"})
    assert (len(example.ids), example.answer_from, example.ids[-1]) == (5, 2, 2)
    assert encoded({"text": "abcd"}).answer_from == 0
    assert encoded({"prompt": "ab", "response": "c"}, Characters(bos=1)).ids[0] == 1
    assert encoded({"prompt": "ab", "response": "c"}, Characters(eos=None)).ids[-1] == 3 + ord("c")


def test_a_batch_is_padded_on_the_right_and_hides_prompts_and_padding() -> None:
    batch = collate([Encoded((10, 11, 12, 2), 2), Encoded((10, 2), 1)], pad=2)

    assert batch["input_ids"].tolist() == [[10, 11, 12, 2], [10, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[MASKED, MASKED, 12, 2], [MASKED, 2, MASKED, MASKED]]


def test_which_token_pads_changes_no_loss() -> None:
    model = models.build(models.resolve("toy-llama"))
    examples = [encoded({"prompt": "a question", "response": "yes"}), encoded({"prompt": "b", "response": "n"})]

    losses = [float(model(**collate(examples, pad)).loss.detach()) for pad in (0, 7)]

    assert losses[0] == losses[1]


def test_a_tokenizer_without_padding_pads_with_its_end_and_says_so() -> None:
    assert padding(Characters(pad=0)) == (0, None)
    token, note = padding(Characters(eos=2))
    assert token == 2
    assert "no padding token" in str(note)
    with pytest.raises(GaugeError, match="pad_token"):
        padding(Characters(eos=None))


def test_an_example_longer_than_the_model_takes_is_refused() -> None:
    encoded({"prompt": "ab", "response": "c"}, most_tokens=4)
    with pytest.raises(GaugeError, match="4 tokens, but the model takes at most 3"):
        encoded({"prompt": "ab", "response": "c"}, most_tokens=3)


def test_an_example_without_text_is_refused() -> None:
    with pytest.raises(GaugeError, match="no text to learn"):
        encoded({"text": ""})


# --- datasets -------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"question {number}", "response": f"answer {number}"} for number in range(8)]


def test_files_and_saved_folders_are_read(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(map(json.dumps, ROWS)))
    table = tmp_path / "rows.csv"
    table.write_text("text\nfirst\nsecond\n")
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "plain"))
    DatasetDict(train=Dataset.from_list(ROWS[:3])).save_to_disk(str(tmp_path / "splits"))

    assert load_examples(str(lines))["response"] == [row["response"] for row in ROWS]
    assert load_examples(str(table))["text"] == ["first", "second"]
    assert len(load_examples(str(tmp_path / "plain"))) == 8
    assert len(load_examples(str(tmp_path / "splits"))) == 3


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"question": "a", "answer": "b"}] * 3, "needs the columns prompt and response, or text; it has question"),
        ([{"prompt": "a"}] * 3, "it has prompt"),
        ([{"text": "a"}], "has 1 example; at least 2"),
        ([{"text": 1}, {"text": 2}], "text of row 0 is a int"),
        ([{"text": "a"}, {"text": None}], "text of row 1 is a NoneType"),
    ],
)
def test_a_dataset_that_does_not_suit_is_one_line(
    rows: list[dict[str, object]], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(GaugeError, match=complaint):
        load_examples(str(path))


def test_a_dataset_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    DatasetDict(test=Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "splits"))
    for name, complaint in (
        ("missing.jsonl", "no such dataset file"),
        ("broken.jsonl", "cannot read the dataset"),
        ("empty.jsonl", "cannot read the dataset|it has none"),
        ("folder", "cannot read the dataset"),
        ("splits", "no split train, only test"),
    ):
        with pytest.raises(GaugeError, match=complaint):
            load_examples(str(tmp_path / name))


# --- the parts of a task --------------------------------------------------------------------------------------


def some(number: int) -> list[Encoded]:
    return [Encoded((k, 2), 1) for k in range(number)]


def test_no_example_is_in_two_parts() -> None:
    task = TextTask(models.resolve("toy-llama"), batches=5, batch=4, validation=6, held_out=8)

    training, validation, held_out = split(some(34), task)

    assert (len(training), len(validation), len(held_out)) == (20, 6, 8)
    assert {*training, *validation, *held_out} == {*some(34)}


def test_a_small_dataset_is_repeated_in_another_order() -> None:
    task = TextTask(models.resolve("toy-llama"), batches=6, batch=2, validation=6, held_out=8)

    training, validation, held_out = split(some(8), task)

    assert (len(validation), len(held_out)) == (2, 2)
    assert len({*training}) == 4
    assert {*training[:4]} == {*training[4:8]} == {*training[8:]}
    assert training[:4] != training[4:8]
    assert {*training}.isdisjoint({*validation, *held_out})


def test_two_examples_are_one_to_train_on_and_one_to_be_judged_by() -> None:
    task = TextTask(models.resolve("toy-llama"), batches=1, batch=2)

    training, validation, held_out = split(some(2), task)

    assert {*training} == {*validation} != {*held_out}


# --- scores ---------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Gives the token after each one probability ``sure``, except where it is ``wrong_at``; the rest is shared out."""

    def __init__(self, sure: float, wrong_at: int | None = None, virtual_tokens: int = 0) -> None:
        super().__init__()
        self.sure, self.wrong_at, self.virtual_tokens = sure, wrong_at, virtual_tokens

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        following = (input_ids + 1) % 10
        if self.wrong_at is not None:
            following[input_ids == self.wrong_at] = 0
        share = torch.full((*input_ids.shape, 10), (1 - self.sure) / 9)
        logits = share.scatter(-1, following[..., None], self.sure).log()
        front = torch.zeros(len(logits), self.virtual_tokens, 10)
        return SimpleNamespace(logits=torch.cat((front, logits), dim=1))


COUNTING = collate([Encoded((3, 4, 5, 6), 2), Encoded((6, 7, 8), 1)], pad=0)


@pytest.mark.parametrize("virtual_tokens", [0, 5])
def test_scores_by_hand(virtual_tokens: int) -> None:
    scored = score(Oracle(0.5, virtual_tokens=virtual_tokens), [COUNTING])
    assert scored.loss == pytest.approx(0.6931, abs=1e-4)
    assert scored.answer_probability == pytest.approx(0.25, abs=1e-6), "two tokens an answer"
    assert scored.exact_match == 1.0


@pytest.mark.parametrize("method", [methods.PROMPT, methods.PREFIX], ids=lambda method: method.name)
def test_the_score_behind_virtual_tokens_by_hand(method: Method) -> None:
    """One row at a time and without padding, where it can be seen which position predicts which token."""
    base = models.build(models.resolve("toy-llama"))
    attached = methods.attach(copy.deepcopy(base), method)
    rows = [Encoded((3, 40, 50, 60, 2), 2), Encoded((6, 70, 2), 1)]
    losses: list[float] = []
    for row in rows:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            if method is methods.PROMPT:  # the base, given the embeddings that PEFT would put together
                virtual = attached.get_parameter("prompt_encoder.default.embedding.weight")
                embedded = torch.cat((virtual, base.get_input_embeddings()(ids)[0]))[None]
                logits = base(inputs_embeds=embedded).logits[0, len(virtual) :]
            else:  # prefixes stand in the cache and have no logits
                logits = attached(input_ids=ids).logits[0]
        assert len(logits) == len(row.ids)
        predicted = logits.log_softmax(-1)
        losses += [-float(predicted[k - 1, row.ids[k]]) for k in range(row.answer_from, len(row.ids))]

    scored = score(attached, [collate(rows, pad=0)])

    assert len(losses) == 5
    assert scored.loss == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert abs(scored.loss - score(base, [collate(rows, pad=0)]).loss) > 1e-3, "virtual tokens without effect"


def test_one_wrong_token_spoils_a_row_and_only_answers_count() -> None:
    assert score(Oracle(0.5, wrong_at=5), [COUNTING]).exact_match == 0.5
    assert score(Oracle(0.5, wrong_at=3), [COUNTING]).exact_match == 1.0  # within the prompt
    # Of four labelled tokens one has probability 1/18 and three have 1/2.
    assert score(Oracle(0.5, wrong_at=5), [COUNTING]).loss == pytest.approx((3 * 0.69315 + 2.89037) / 4, abs=1e-4)


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(GaugeError, match="no response"):
        score(Oracle(0.5), [collate([Encoded((3, 4), 2)], pad=0)])


def test_exact_match_is_what_greedy_decoding_gives() -> None:
    model = models.build(models.resolve("toy-llama")).eval()
    prompts = torch.randint(3, 256, (6, 5), generator=torch.Generator().manual_seed(0))
    written = model.generate(prompts, max_new_tokens=4, min_new_tokens=4, do_sample=False, eos_token_id=None)
    rows = [Encoded(tuple(row), 5) for row in written.tolist()]
    changed = [Encoded((*row.ids[:-1], (row.ids[-1] + 1) % 256), 5) for row in rows[:3]]

    assert score(model, [collate(rows, 0)]).exact_match == 1.0
    assert score(model, [collate([*rows[3:], *changed], 0)]).exact_match == 0.5


# --- the whole of it, on the toy model ------------------------------------------------------------------------


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> PreparedText:
    record = models.resolve("toy-llama")
    monkeypatch.setattr(tasks, "_tokenizer", lambda model: Characters())
    return TextTask(record, batches=40, batch=8, validation=8, held_out=16).prepared()


def test_a_model_learns_the_answers_and_is_scored_on_others(prepared: PreparedText) -> None:
    job = prepared.job(methods.FULL)
    before = prepared.scores(job)

    curve = train(job, Schedule(40, 0.01))

    after = prepared.scores(job)
    assert before["loss_learned"] == pytest.approx(0.0, abs=1e-6)
    assert before["forgetting"] == pytest.approx(0.0, abs=1e-6)
    assert before["exact_match"] == before["base_exact_match"] == 0.0
    assert after["loss_learned"] > 0.3
    assert after["quality"] == after["answer_probability"] > before["answer_probability"]
    assert after["held_out_loss"] < before["held_out_loss"]
    assert curve.divergence is None
    assert prepared.notes == ("the tokenizer has no padding token; its end-of-text token is used",)


def test_forgetting_is_by_how_much_the_loss_on_known_text_rises(prepared: PreparedText) -> None:
    """Were the held-out answers the known text, it would be what the loss on them has risen by: they are learned."""
    swapped = replace(prepared, known=prepared.held_out)
    job = swapped.job(methods.FULL)
    train(job, Schedule(5, 0.01))

    scores = swapped.scores(job)

    assert scores["forgetting"] == pytest.approx(scores["held_out_loss"] - scores["base_held_out_loss"])
    assert scores["forgetting"] < -0.1


def test_scoring_leaves_a_model_in_training_and_its_dropout_as_it_was(prepared: PreparedText) -> None:
    """A model in evaluation mode could not go on training where bitsandbytes has repacked its 4-bit weights."""
    job = prepared.job(methods.LORA.variant("lora-half", "LoRA", peft_config={"lora_dropout": 0.5}))
    assert prepared.scores(job)["update_norm"] == 0.0
    train(job, Schedule(3, 0.1))  # from now on the adapter, and its dropout, have an effect
    first, second = prepared.scores(job), prepared.scores(job)
    assert first == second
    assert first["update_norm"] > 0.0
    assert all(module.training for module in job.model.modules())


def test_the_same_seed_gives_every_method_the_same_batches(prepared: PreparedText) -> None:
    again = prepared.task.prepared()
    assert all(
        torch.equal(first["input_ids"], second["input_ids"])
        for first, second in zip(prepared.training, again.training, strict=True)
    )
    assert prepared.job(methods.LORA).batches is prepared.job(methods.FULL).batches


def test_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(GaugeError, match="no tokenizer"):
        TextTask(models.resolve("toy-llama")).prepared()


def test_an_impossible_task_is_refused() -> None:
    with pytest.raises(GaugeError, match="at least 1"):
        TextTask(models.resolve("toy-llama"), batches=0)
