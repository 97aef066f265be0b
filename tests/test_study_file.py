"""Study files as people write them, rightly and wrongly: the whole messages are what is tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rsauto import study_file
from rsauto.choices import PowerRange, RateRange
from rsauto.config import StudyConfig
from rsauto.errors import InputError
from rsauto.study_file import dump, load, validate


def written(folder: Path, text: str, name: str = "s.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, **options: Any) -> list[str]:
    """Every problem of a file, without the folder in front."""
    path = written(folder, text)
    with pytest.raises(InputError) as caught:
        load(path, **options)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return [line.replace(f"{folder}/", "") for line in caught.value.problems]


def test_the_study_that_comes_with_the_package_is_valid() -> None:
    config = load()
    assert config.name == "embedded"
    assert config.model.name == config.data.name == "embedded"


def test_numbers_that_yaml_calls_text_are_numbers(tmp_path: Path) -> None:
    # In YAML 1.1 1e-5 is text, 1.0e-5 a number.
    text = "search: {learning_rate: {low: 1e-5, high: 1E-2}, lr_ratio: [1e0], within: 2e-2}"
    search = load(written(tmp_path, text)).search
    assert search.learning_rate == RateRange(low=1e-5, high=1e-2)
    assert (search.lr_ratio, search.within) == ((1.0,), 0.02)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("serach: {trials: 3}", "s.yaml:1: serach: unknown key. Did you mean 'search'?"),
        ("\n\nsearch:\n  trails: 3",
         "s.yaml:4: search.trails: unknown key. Did you mean 'trials'?"),
        ("model:\n  zzzz: 3", "s.yaml:2: model.zzzz: unknown key. Allowed here: name, revision, "
         "dtype, quant_bits, adapter_dtype, attn_implementation, gradient_checkpointing, "
         "target_modules."),
        ("1: 2", "s.yaml:1: 1: unknown key. Allowed here: name, memory_budget, "
         "pack_memory_budget, model, data, training, search, adalora, packing, presets."),
        ("search: {rank: {low: 2}}", "s.yaml:1: search.rank.high: is missing."),
        ("search:\n  rank: {low: 3, high: 8}",
         "s.yaml:2: search.rank: low must be a power of two, or give a list instead."),
        ("search:\n  rank: big", "s.yaml:2: search.rank: must be a whole number (got 'big')."),
        ("search:\n  rank: 4.5", "s.yaml:2: search.rank: must be a whole number (got 4.5)."),
        ("search:\n  rank:\n  - 4\n  - 0", "s.yaml:4: search.rank.1: must be at least 1 (got 0)."),
        ("search: {rank: }", "s.yaml:1: search.rank: must be a list (got nothing)."),
        ("search: {rank: []}", "s.yaml:1: search.rank: must not be empty."),
        ("search:\n  learning_rate: fast",
         "s.yaml:2: search.learning_rate: must be a number (got 'fast')."),
        ("training: {steps: 9, micro_batch_size: many}",
         "s.yaml:1: training.micro_batch_size: must be a whole number or 'auto' (got 'many')."),
        ("training:\n  steps: 9\n  micro_batch_size: 5", "s.yaml:3: training: micro_batch_size "
         "must divide batch_size 16: one of [1, 2, 4, 8, 16]."),
        ("name: a\nmemory_budget: 24 GiBB", "s.yaml:2: memory_budget: give a size such as 24GiB, "
         "512MiB or a number of bytes, or auto (got '24 GiBB')."),
        ("memory_budget: 2GiB\npack_memory_budget: 1GiB", "s.yaml:2: study: pack_memory_budget "
         "must be at least memory_budget, which is 2.00 GiB (got 1.00 GiB); null makes it the "
         "same."),
        ("model: {target_modules: q_proj}", "s.yaml:1: model.target_modules: must be 'all-linear' "
         "or 'attention' or a list (got 'q_proj')."),
        ("model: {target_modules: [1]}", "s.yaml:1: model.target_modules.0: must be text, in "
         "quotes where it looks like something else (got 1)."),
        ("search: {target_modules: [q_proj]}", "s.yaml:1: search.target_modules.0: must be "
         "'all-linear' or 'attention' or a list (got 'q_proj')."),
        ("model: {dtype: fp8}", "s.yaml:1: model.dtype: must be 'auto', 'float32', 'bfloat16' or "
         "'float16' (got 'fp8')."),
        ("training: 5", "s.yaml:1: training: must be a mapping of keys to values (got 5)."),
        ("search:", "s.yaml:1: search: must be a mapping of keys to values (got nothing)."),
        ("search: [1]", "s.yaml:1: search: must be a mapping of keys to values."),
        ("name: my study", "s.yaml:1: name: must be letters, digits, dots, dashes and "
         "underscores, the first a letter or digit (got 'my study')."),
        ("model: {revision: 1234567}", "s.yaml:1: model.revision: must be text, in quotes where "
         "it looks like something else (got 1234567)."),
        ("model: {gradient_checkpointing: maybe}",
         "s.yaml:1: model.gradient_checkpointing: must be true or false (got 'maybe')."),
        ("search:\n  trials: 3\n  trials: 4", "s.yaml:3: search.trials: given twice."),
        ("- 1", "s.yaml: a study file is a mapping of keys to values, see the README."),
        ("hello", "s.yaml: a study file is a mapping of keys to values, see the README."),
        ("search: [1, 2\nmodel: }", "s.yaml:2: not valid YAML: expected ',' or ']', but got ':'."),
        ("name: 2024-13-45", "s.yaml: not valid YAML: month must be in 1..12."),
        ("search: &a {rank: *a}",
         "s.yaml: not valid YAML: it contains itself, or is too deep."),
        ("name: !!python/object/apply:os.getcwd []", "s.yaml:1: not valid YAML: could not "
         "determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd'."),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_line_with_file_line_and_key(
    tmp_path: Path, text: str, expected: str
) -> None:
    assert problems(tmp_path, text) == [expected]


def test_every_mistake_is_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """
memory_budget: lots
model:
  nmae: x
  dtype: fp8
search:
  rank: {low: 3, hihg: 8}
  trials: 0
  learning_rate: [1e-4, -1]
"""
    found = problems(tmp_path, text)
    assert [line.partition(": ")[0] for line in found] == [
        "s.yaml:2", "s.yaml:4", "s.yaml:5", "s.yaml:7", "s.yaml:7", "s.yaml:8", "s.yaml:9",
    ]  # fmt: skip
    assert "s.yaml:7: search.rank.hihg: unknown key. Did you mean 'high'?" in found


def test_a_file_that_is_not_there_is_answered_with_its_neighbours(tmp_path: Path) -> None:
    written(tmp_path, "name: a", "study.yaml")
    with pytest.raises(InputError, match=r"studdy\.yaml: no such study file\. Did you mean 'study"):
        load(tmp_path / "studdy.yaml")
    with pytest.raises(InputError, match=r"x\.yaml: no such study file\.$"):
        load(tmp_path / "nowhere" / "x.yaml")


def test_a_folder_or_a_binary_file_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder, not a study file\.$"):
        load(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match=r"is not a text file in UTF-8\.$"):
        load(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("file", "name"),
    [("gsm8k.yaml", "gsm8k"), ("my study (1).yaml", "my-study-1"), ("日本.yaml", "study")],
)
def test_a_study_without_a_name_is_called_after_its_file(
    tmp_path: Path, file: str, name: str
) -> None:
    assert load(written(tmp_path, "", file)).name == name


BASE = """
training: {steps: 10}
search:
  rank: {low: 2, high: 64}
  learning_rate: {low: 1e-4, high: 1e-2}
presets:
  quick: {search: {trials: 2, rank: [4]}, training: {batch_size: 4}}
  broken: {search: {trials: 0}}
"""


@pytest.mark.parametrize(
    ("assignment", "rank"),
    [
        ("search.rank=[4, 12]", (4, 12)),
        ("search.rank=8", (8,)),
        ("search.rank.low=8", PowerRange(low=8, high=64)),
        ("search.rank.high=8", PowerRange(low=2, high=8)),
        ("search.rank={low: 16, high: 32}", PowerRange(low=16, high=32)),
        ("search={}", PowerRange(low=2, high=64)),
        (" search . rank = 8", (8,)),
    ],
)
def test_set_replaces_a_choice_or_one_end_of_a_range(
    tmp_path: Path, assignment: str, rank: object
) -> None:
    config = load(written(tmp_path, BASE), sets=[assignment])
    assert config.search.rank == rank
    assert config.search.learning_rate == RateRange(low=1e-4, high=1e-2)
    assert config.training.steps == 10


def test_set_turns_a_list_into_a_range_when_both_ends_are_given(tmp_path: Path) -> None:
    path = written(tmp_path, "search: {rank: [4, 12]}")
    both = ["search.rank.low=2", "search.rank.high=8"]
    assert load(path, sets=both).search.rank == PowerRange(low=2, high=8)
    assert problems(tmp_path, "search: {rank: [4, 12]}", sets=both[:1]) == [
        "--set search.rank.low=2: search.rank.high: is missing."
    ]


def test_later_sets_win_and_null_takes_a_setting_back(tmp_path: Path) -> None:
    path = written(tmp_path, BASE)
    config = load(path, sets=["search.trials=3", "search.trials=5"])
    assert config.search.trials == 5
    config = load(path, sets=["training.steps=null", "training.epochs=2"])
    assert (config.training.steps, config.training.epochs) == (None, 2.0)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("search.trials=x", "--set search.trials=x: search.trials: must be a whole number "
         "(got 'x')."),
        ("search.tirals=1", "--set search.tirals=1: search.tirals: unknown key. Did you mean "
         "'trials'?"),
        ("search.rank=[1", "--set search.rank=[1: search.rank: must be a whole number "
         "(got '[1')."),
        ("search.rank.low=3", "--set search.rank.low=3: search.rank: low must be a power of two, "
         "or give a list instead."),
        ("search=5", "--set search=5: search: must be a mapping of keys to values (got 5)."),
        ("model.target_modules=q_proj", "--set model.target_modules=q_proj: model.target_modules: "
         "must be 'all-linear' or 'attention' or a list (got 'q_proj')."),
        ("nope", "--set nope: must look like section.key=value."),
        ("=3", "--set =3: must look like section.key=value."),
        ("a..b=1", "--set a..b=1: must look like section.key=value."),
    ],
)  # fmt: skip
def test_a_mistake_in_set_is_told_where_it_was_made(
    tmp_path: Path, assignment: str, expected: str
) -> None:
    assert problems(tmp_path, BASE, sets=[assignment]) == [expected]


def test_an_option_comes_last_and_a_mistake_in_it_names_it(tmp_path: Path) -> None:
    path = written(tmp_path, BASE)
    options = {"search.trials": 7, "memory_budget": None}
    assert load(path, sets=["search.trials=3"], options=options).search.trials == 7
    with pytest.raises(InputError, match=r"^--trials 0: search\.trials: must be .* \(got 0\)"):
        load(path, options={"search.trials": 0})


def test_a_preset_changes_what_it_names_and_sets_come_after_it(tmp_path: Path) -> None:
    path = written(tmp_path, BASE)
    config = load(path, preset="quick", sets=["search.trials=3"])
    assert (config.search.trials, config.search.rank) == (3, (4,))
    assert (config.training.steps, config.training.batch_size) == (10, 4)
    assert load(path).training.batch_size == 16


def test_a_preset_is_kept_as_it_was_written_when_sets_change_what_it_gave(tmp_path: Path) -> None:
    text = "presets: {wide: {search: {rank: {low: 2, high: 512}}}}"
    config = load(written(tmp_path, text), preset="wide", sets=["search.rank.low=8"])
    assert config.search.rank == PowerRange(low=8, high=512)
    assert config.presets == {"wide": {"search": {"rank": {"low": 2, "high": 512}}}}


def test_an_unknown_or_faulty_preset_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path, BASE, preset="quikc") == [
        "--preset quikc: the study has no such preset. Did you mean 'quick'? It has: quick, broken."
    ]
    assert problems(tmp_path, "name: a", preset="quick") == [
        "--preset quick: the study has no such preset. It has: none."
    ]
    assert problems(tmp_path, BASE, preset="broken") == [
        "s.yaml: preset broken: search.trials: must be at least 1 (got 0)."
    ]


@pytest.mark.parametrize(
    "text",
    [
        BASE,
        "memory_budget: 24GiB",
        "memory_budget: 24GiB\npack_memory_budget: auto\npacking: {mode: off, trials: 4}",
        "model: {target_modules: [q_proj, v_proj]}\ndata: {prompt: 'Q: {q}\\n', completion: '{a}'}",
        "training: {epochs: 1.5, micro_batch_size: 4, max_grad_norm: null}",
        "search: {rank: [4, 2048], alpha: 8, learning_rate: [1e-5, 3.3e-4], strategy: grid,"
        " target_modules: [attention, [q_proj], all-linear], direction: maximize}",
    ],
)
def test_a_dumped_study_loads_as_an_equal_one(tmp_path: Path, text: str) -> None:
    config = load(written(tmp_path, text))
    again = load(written(tmp_path, dump(config), "again.yaml"))
    assert again == config
    assert dump(again) == dump(config)


@settings(deadline=None, max_examples=15)
@example(prompt="a\x85b\u2028c", low=1e-5, num_bytes=1)
@given(
    prompt=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
    low=st.floats(1e-300, 1e300),
    num_bytes=st.integers(1, 2**60),
)
def test_any_template_rate_and_size_survive_the_file(
    prompt: str, low: float, num_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = StudyConfig.model_validate(
        {
            "name": "s",
            "memory_budget": num_bytes,
            "data": {"prompt": prompt, "completion": "{a}"},
            "search": {"learning_rate": {"low": low, "high": 2 * low}},
        }
    )
    path = tmp_path_factory.getbasetemp() / "s.yaml"
    path.write_text(dump(config), encoding="utf-8", newline="")
    assert load(path) == config


def test_a_dict_is_checked_like_a_file() -> None:
    assert validate({}) == StudyConfig()
    with pytest.raises(InputError) as caught:
        validate({"search": {"trials": "x"}, "a": 1})
    assert len(caught.value.problems) == 2
    assert "config: search.trials: must be a whole number (got 'x')." in caught.value.problems


def test_the_embedded_study_is_a_file_of_the_package() -> None:
    assert study_file.STUDY_FILE.is_file()
