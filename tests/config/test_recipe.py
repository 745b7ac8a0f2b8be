import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vitos.config.recipe import (
    ConfigError,
    DataSection,
    DualStreamOptions,
    EvaluateSection,
    ExtraRewardSection,
    LoraSection,
    ModelSection,
    Recipe,
    RewardsSection,
    SparsifySection,
    WarmStartSection,
    dump_recipe,
    load_recipe,
)
from vitos.config.yaml_file import dump_yaml, parse_yaml
from vitos.policy.plans import check_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
MINIMAL = "name: t\noutput_dir: runs/t\ndata: {train: a.json}\n"


@pytest.fixture
def write(tmp_path):
    def _write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def problems_of(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


# --- the recipes of the repository


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_and_survives_a_round_trip(path, write):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.output_dir == f"runs/{path.stem}"
    assert load_recipe(write(dump_recipe(recipe))) == recipe


def test_all_recipes_are_there():
    names = {path.stem for path in RECIPES}
    assert names >= {
        "quickstart",
        "real",
        "lingshu-7b",
        "lingshu-7b-lora-1gpu",
        "lingshu-32b",
        "huatuogpt-vision-7b",
    }


def test_trainer_and_train_fields_are_known_to_transformers():
    from transformers import TrainingArguments

    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    for path in RECIPES:
        assert set(load_recipe(path).trainer) <= known
    # What the docstring calls "as in TrainingArguments" must be taken over by a class that inherits both.
    shared = known & {f.name for f in dataclasses.fields(DualStreamOptions)}
    assert shared >= {"learning_rate", "weight_decay", "adam_beta2", "max_grad_norm", "warmup_steps", "seed", "bf16"}

    @dataclasses.dataclass
    class Both(DualStreamOptions, TrainingArguments):
        pass

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no default of ours is one that transformers complains about
        both = Both(output_dir="unused")
    assert (both.learning_rate, both.adam_beta2, both.logging_steps) == (1e-6, 0.95, 1)


def test_importing_the_config_imports_nothing_heavy():
    code = (
        "import sys, vitos.config.recipe;"
        "print([m for m in ('torch', 'transformers', 'numpy', 'scipy', 'PIL', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- reading


def test_defaults_and_types(write):
    recipe = load_recipe(write(MINIMAL))
    assert recipe == Recipe(name="t", output_dir="runs/t", data=DataSection(train=("a.json",)))
    assert recipe.model == ModelSection()
    assert recipe.train == DualStreamOptions()
    assert recipe.warm_start is None
    assert recipe.data.eval == ()


@pytest.mark.parametrize("text", ["2e-6", "2.0e-6", "0.000002", '"2e-6"', "2E-6", "+2e-6"])
def test_learning_rates_as_people_write_them(write, text):
    assert load_recipe(write(MINIMAL), [f"train.learning_rate={text}"]).train.learning_rate == 2e-6


def test_exponents_are_numbers_where_no_type_says_so(write):
    recipe = load_recipe(write(MINIMAL + "trainer: {adam_epsilon: 1e-8, run_name: v1e}\n"))
    assert recipe.trainer == {"adam_epsilon": 1e-8, "run_name": "v1e"}


def test_seed_reaches_sections_without_one(write):
    text = MINIMAL + "seed: 7\nwarm_start: {steps: 3}\n"
    recipe = load_recipe(write(text))
    assert (recipe.seed, recipe.train.seed, recipe.warm_start.seed) == (7, 7, 7)
    recipe = load_recipe(write(text + "train: {seed: 1}\n"))
    assert (recipe.seed, recipe.train.seed, recipe.warm_start.seed) == (7, 1, 7)
    assert load_recipe(write(text), ["seed=9"]).train.seed == 9


def test_overrides(write):
    recipe = load_recipe(
        write(MINIMAL + "model: {lora: null}\n"),
        [
            "train.learning_rate=3e-6",
            "data.eval=[b.json, c.json]",
            "model.lora.r=8",
            "warm_start={steps: 5}",
            "name=a=b",
            "train.schedule=localization-only",
        ],
    )
    assert recipe.train.learning_rate == 3e-6
    assert recipe.data.eval == ("b.json", "c.json")
    assert recipe.model.lora == LoraSection(r=8)
    assert recipe.warm_start == WarmStartSection(steps=5)
    assert recipe.name == "a=b"
    assert recipe.train.total_steps == 100


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate", "write it as dotted.key=value"),
        ("=3", "write it as dotted.key=value"),
        ("train..seed=3", "write it as dotted.key=value"),
        ("name.x=3", "name is a single value without keys"),
        ("data.train=[a", "not valid YAML"),
        ("train.lerning_rate=1", "did you mean train.learning_rate?"),
    ],
)
def test_bad_overrides(write, override, expected):
    assert any(expected in line for line in problems_of(write(MINIMAL), [override]))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("learning_rate: 1e-6\n", "learning_rate: unknown key; did you mean train.learning_rate"),
        ("tran: {}\n", "tran: unknown key; did you mean train?"),
        ("train: {temprature: 1}\n", "train.temprature: unknown key; did you mean train.temperature?"),
        ("train: {fusion: mean}\n", "train.fusion: unknown key; did you mean sparsify.fusion?"),
        ("train: {deepspeed_stage: 3}\n", "go under trainer"),
        ("model: {lora: {rank: 3, alhpa: 1}}\n", "model.lora.alhpa: unknown key; did you mean model.lora.alpha?"),
        (
            "rewards: {extra: [{function: 'a.py:f', wieght: 1}]}\n",
            "rewards.extra[0].wieght: unknown key; did you mean",
        ),
        ("zzqqxx: 1\n", "zzqqxx: unknown key"),
        ("train: {1: 2}\n", "train.1: keys must be text"),
    ],
)
def test_unknown_keys_name_the_nearest(write, extra, expected):
    lines = problems_of(write(MINIMAL + extra))
    assert any(expected in line for line in lines), lines


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("train.temperature=0", "train.temperature", "greater than 0, got 0"),
        ("train.temperature=.nan", "train.temperature", "finite"),
        ("train.temperature=true", "train.temperature", "not true or false"),
        ("train.questions_per_step=true", "train.questions_per_step", "valid integer"),
        ("train.questions_per_step=0", "train.questions_per_step", "greater than or equal to 1"),
        ("train.questions_per_step=2.0", "train.questions_per_step", "valid integer"),
        ("train.bf16=1", "train.bf16", "valid boolean"),
        ("train.num_localizations=0", "train.num_localizations", "greater than or equal to 1"),
        ("train.learning_rate=0", "train.learning_rate", "greater than 0"),
        ("train.learning_rate=fast", "train.learning_rate", "got 'fast'"),
        ("train.schedule=stagd", "train.schedule", "'staged'"),
        ("train.localization_share=1", "train.localization_share", "less than 1"),
        ("train.report_to=3", "train.report_to", "a name or a list of names"),
        ("train=3", "train", "must be a mapping of keys to values, got 3"),
        ("train=", "train", "must be a mapping of keys to values, got None"),
        ("trainer=3", "trainer", "must be a mapping of keys to values, got 3"),
        ("evaluate.budgets=[0.5, 0]", "evaluate.budgets[1]", "greater than 0"),
        ("evaluate.budgets=[1.5]", "evaluate.budgets[0]", "less than or equal to 1"),
        ("sparsify.margin=-1", "sparsify.margin", "greater than or equal to 0"),
        ("sparsify.beta=1.1", "sparsify.beta", "less than or equal to 1"),
        ("sparsify.fusion=avg", "sparsify.fusion", "'weighted'"),
        ("rewards.iou=-0.1", "rewards.iou", "greater than or equal to 0"),
        ("rewards.extra=[{function: reward}]", "rewards.extra[0].function", "rewards.py:my_reward"),
        ("rewards.extra=[{function: 'a.py:iou'}]", "rewards.extra", "logged as iou"),
        ("rewards.extra=[{function: 'a.py:f'}, {function: 'b.py:f'}]", "rewards.extra", "logged as f"),
        ("rewards={format: 0, iou: 0, accuracy: 0, feedback: 0}", "rewards.accuracy", "nothing would be learned"),
        ("data.train=[]", "data.train", "at least one record file"),
        ("data.train=[a.json, a.json]", "data.train", "more than once"),
        ("data.train=3", "data.train", "a path or a list of paths"),
        ("data={}", "data.train", "is required"),
        ("model={min_pixels: 9, max_pixels: 4}", "model.min_pixels", "must not exceed model.max_pixels"),
        ("model.path=''", "model.path", "is empty"),
        ("warm_start={}", "warm_start.steps", "is required"),
        ("data={train: a.json, cache: ''}", "data.cache", "at least 1 character"),
        ("data={train: a.json, cache: 3}", "data.cache", "valid string"),
        ("trainer.learning_rate=1", "trainer.learning_rate", "set train.learning_rate"),
        ("trainer.output_dir=x", "trainer.output_dir", "set output_dir"),
        ("trainer.max_steps=3", "trainer.max_steps", "set train.localization_steps"),
        ("name=", "name", "valid string"),
    ],
)
def test_ranges_and_rules(write, override, key, expected):
    (line,) = problems_of(write(MINIMAL), [override])
    assert line.startswith(f"{key}: ")
    assert expected in line


@pytest.mark.parametrize(
    "wrong", ["data.cache=runs/cache", "train.schedule=dense", "train.sampler=vllm", "evaluate.budgets=[0.5]"]
)
def test_plan_coarse_encodes_an_image_twice(write, wrong):
    changes = ["sparsify.plan=coarse", "evaluate.budgets=[]", wrong]
    with pytest.raises(ConfigError) as caught:
        check_recipe(load_recipe(write(MINIMAL), changes))
    (line,) = caught.value.problems
    assert line.startswith(wrong.split("=")[0] + ": ")
    assert "plan: coarse" in line


@pytest.mark.parametrize(
    ("plan", "change", "said"),
    [
        ("gather", "sparsify.positions=renumber", "written already"),
        ("crop", "evaluate.budgets=[]", "no model can be trained"),
        ("dense", "evaluate.budgets=[]", "no model can be trained"),
    ],
)
def test_what_contradicts_another_plan(write, plan, change, said):
    with pytest.raises(ConfigError, match=said):
        check_recipe(load_recipe(write(MINIMAL), [f"sparsify.plan={plan}", change]))
    check_recipe(load_recipe(write(MINIMAL), ["sparsify.plan=gather"]))


def test_a_plan_that_is_none_is_named(write):
    (line,) = problems_of(write(MINIMAL), ["sparsify.plan=fast"])
    assert line == "sparsify.plan: must be one of coarse, crop, dense, gather, glance, one_pass, two_pass, got 'fast'"


def test_adapters_leave_no_weights_to_unfreeze(write):
    (line,) = problems_of(write(MINIMAL), ["model.lora={r: 4}", "train.unfrozen_parameters=[norm]"])
    assert line.startswith("train.unfrozen_parameters: has no effect with model.lora")


def test_a_warm_start_of_the_encoder_changes_what_a_cache_holds(write):
    (line,) = problems_of(write(MINIMAL), ["data.cache=runs/cache", "warm_start={steps: 3, train_encoder: true}"])
    assert line.startswith("data.cache: ")
    assert "leave out warm_start.train_encoder" in line
    load_recipe(write(MINIMAL), ["data.cache=runs/cache", "warm_start={steps: 3}"])


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_localizations": 1, "num_reasonings": 1}, "num_localizations"),
        ({"num_reasonings": 1, "advantage_group": "evidence"}, "num_reasonings"),
        ({"kl_beta": 0.1, "localization_kl": 0.1}, "localization_kl"),
        ({"schedule": "joint", "frozen_boxes": True}, "frozen_boxes"),
        ({"schedule": "reversed", "localization_kl": 0.1}, "localization_kl"),
        ({"schedule": "dense", "localization_share": 0.1}, "localization_share"),
        ({"schedule": "joint", "stage1_num_reasonings": 2}, "stage1_num_reasonings"),
        ({"schedule": "joint", "stage1_learning_rate": 1e-4}, "stage1_learning_rate"),
        ({"localization_steps": 0}, "localization_steps"),
        ({"schedule": "reasoning-only", "reasoning_steps": 0}, "reasoning_steps"),
        ({"warmup_steps": 5}, "warmup_steps"),
        ({"warmup_steps": 500, "lr_scheduler_type": "linear"}, "warmup_steps"),
        ({"temperature": -1.0}, "temperature"),
        ({"clip_low": 1.0}, "clip_low"),
    ],
)
def test_options_built_in_code_obey_the_same_rules(write, options, key):
    with pytest.raises(ConfigError) as caught:
        DualStreamOptions(**options).validate()
    text = yaml.safe_dump({"train": options})
    assert problems_of(write(MINIMAL + text)) == caught.value.problems
    (line,) = caught.value.problems
    assert line.startswith(f"train.{key}: ")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_localizations": 1},
        {"num_reasonings": 1},
        {"frozen_boxes": True, "localization_kl": 0.1, "localization_share": 0.2},
        {"schedule": "localization-only", "reasoning_steps": 0, "stage1_num_localizations": 8},
        {"schedule": "reasoning-only", "localization_steps": 0},
        {"warmup_steps": 5, "lr_scheduler_type": "constant_with_warmup"},
        {"temperature": 1, "report_to": ["tensorboard", "wandb"]},
    ],
)
def test_sound_options_pass(options):
    DualStreamOptions(**options).validate()


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [("staged", 30), ("joint", 30), ("dense", 30), ("localization-only", 10), ("reasoning-only", 20)],
)
def test_total_steps(schedule, steps):
    options = DualStreamOptions(schedule=schedule, localization_steps=10, reasoning_steps=20)
    assert options.total_steps == steps


def test_all_problems_come_at_once(write):
    path = write("data: {train: []}\nlearning_rate: 1\ntrain: {temperature: 0, sed: 1}\nrewards: {iou: x}\n")
    lines = problems_of(path, ["warm_start.steps=0", "oops"])
    keys = {line.split(": ")[0] for line in lines}
    assert keys == {
        "--set oops",
        "name",
        "output_dir",
        "data.train",
        "learning_rate",
        "train.temperature",
        "train.sed",
        "rewards.iou",
        "warm_start.steps",
    }
    with pytest.raises(ConfigError, match=r"recipe\.yaml: 9 problems\n  - "):
        load_recipe(path, ["warm_start.steps=0", "oops"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MINIMAL + "train: {seed: 1, seed: 2}\n", "the key 'seed' is given twice"),
        (MINIMAL + "name: again\n", "the key 'name' is given twice"),
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "does not hold a mapping"),
        ("", "does not hold a mapping"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_unreadable_files(write, text, expected):
    (line,) = problems_of(write(text))
    assert expected in line


def test_missing_file_and_wrong_encoding(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: 1 problem\n.*cannot be read"):
        load_recipe(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path / "latin.yaml")


# --- writing

text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1)
positive = st.floats(1e-12, 1e6)
count = st.integers(1, 10**9)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner) | st.dictionaries(text, inner),
    max_leaves=8,
)
recipes = st.builds(
    Recipe,
    name=text,
    output_dir=text,
    data=st.builds(
        DataSection, train=st.lists(text, min_size=1, unique=True).map(tuple), limit_eval=st.none() | count
    ),
    seed=st.integers(0, 2**32),
    model=st.builds(
        ModelSection,
        path=text,
        lora=st.none() | st.builds(LoraSection, r=count, target_modules=text | st.lists(text, min_size=1)),
    ),
    sparsify=st.builds(SparsifySection, margin=st.integers(0, 9), beta=st.floats(0, 1)),
    warm_start=st.none() | st.builds(WarmStartSection, steps=count, learning_rate=positive),
    rewards=st.builds(
        RewardsSection,
        iou=positive,
        extra=st.sampled_from(
            [(), (ExtraRewardSection("a/b.py:f", -1.0), ExtraRewardSection("c.py:g", branch="both"))]
        ),
    ),
    train=st.builds(
        DualStreamOptions, learning_rate=positive, report_to=text, bf16=st.booleans(), seed=st.integers(0, 99)
    ),
    trainer=st.dictionaries(text.map(lambda t: f"x{t}"), plain, max_size=3),
    evaluate=st.builds(EvaluateSection, budgets=st.lists(st.floats(0.01, 1)).map(tuple)),
)


@settings(max_examples=50, deadline=None)
@given(recipes)
def test_any_recipe_survives_a_round_trip(tmp_path_factory, recipe):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


@given(plain)
def test_yaml_gives_back_what_was_dumped(value):
    assert parse_yaml(dump_yaml(value)) == value


@pytest.mark.parametrize("value", ["1e5", "2e-6", "no", "null", "0x1f", "1_000", "", "~", "2026-01-01", "a: b", "#x"])
def test_text_that_looks_like_something_else_stays_text(value):
    assert parse_yaml(dump_yaml([value])) == [value]


def test_merge_keys_still_work():
    assert parse_yaml("a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}\n") == {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}
