"""Study files: what they accept, and what they say of what they refuse."""

import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.records import complaints
from resnext_ablate.records.checks import load_check
from resnext_ablate.records.config import (
    RunConfig,
    StudyConfig,
    differences,
    json_schema,
    load_study,
)

REPOSITORY = Path(__file__).parents[1]
STUDIES = [
    path
    for path in sorted((REPOSITORY / "studies").glob("*.toml"))
    if load_check(path) is None
]
SCHEMA = REPOSITORY / "resnext_ablate" / "study.schema.json"

MINIMAL = """\
name = "tiny"

[net]
template = "resnet11-t16"
cardinality = [1, 2]

[data]
name = "digits"

[train]
epochs = 4
"""


def load(
    tmp_path: Path, text: str, *overrides: str, profile: str | None = None
) -> StudyConfig:
    path = tmp_path / "study.toml"
    path.write_text(text, encoding="utf-8")
    return load_study(path, overrides=overrides, profile=profile)


def refusal(
    tmp_path: Path, text: str, *overrides: str, profile: str | None = None
) -> str:
    with pytest.raises(InputError) as caught:
        load(tmp_path, text, *overrides, profile=profile)
    return str(caught.value).replace(str(tmp_path), "DIR")


def test_defaults_are_the_papers_cifar_recipe(tmp_path: Path) -> None:
    """Momentum 0.9, weight decay 5e-4 on all, batch 128, drops at 1/2 and 3/4."""
    train = load(tmp_path, MINIMAL).train
    assert (train.momentum, train.weight_decay, train.batch_size) == (0.9, 5e-4, 128)
    assert (train.schedule, train.step_milestones) == ("step", (0.5, 0.75))
    assert train.decay_norm_and_bias and train.nesterov


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_load_and_fit_the_schema(path: Path) -> None:
    """Each study file is valid, is named as its file, and states its question."""
    study = load_study(path)
    assert study.name == path.stem
    assert study.question
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    jsonschema.validate(values, json.loads(SCHEMA.read_text(encoding="utf-8")))


def test_shipped_schema_is_that_of_the_config() -> None:
    """The schema for editors cannot drift from what the loader accepts."""
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == json_schema()


def test_schema_refuses_what_the_loader_refuses() -> None:
    """An unknown key fails the schema as well."""
    values = tomllib.loads(MINIMAL)
    values["train"]["lr"] = 0.1
    with pytest.raises(jsonschema.ValidationError, match="lr"):
        jsonschema.validate(values, json_schema())


def profiles_of(path: Path) -> list[str]:
    return list(tomllib.loads(path.read_text(encoding="utf-8")).get("profiles", {}))


@pytest.mark.parametrize(
    ("path", "profile"),
    [(path, profile) for path in STUDIES for profile in profiles_of(path)],
    ids=lambda value: value if isinstance(value, str) else value.stem,
)
def test_profiles_of_shipped_studies_load(
    path: Path, profile: str, tmp_path: Path
) -> None:
    """Each is a study of its own, and reads back as what it is."""
    study = load_study(path, profile=profile)
    assert study.name == f"{path.stem}-{profile}"
    assert load(tmp_path, study.to_toml()) == study


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_resolved_file_reads_back_as_the_same_study(path: Path, tmp_path: Path) -> None:
    """Writing a config as TOML loses nothing."""
    study = load_study(path)
    assert load(tmp_path, study.to_toml()) == study


def test_overrides_are_parsed_as_toml_and_bare_words_are_strings(
    tmp_path: Path,
) -> None:
    """Numbers, lists, booleans and plain words all arrive as what they are."""
    study = load(
        tmp_path,
        MINIMAL,
        "train.epochs=7",
        "train.learning_rate=1e-2",
        "run.seeds=[3, 5]",
        "data.flip=false",
        "data.root=some/where",
        "name=other",
    )
    assert study.train.epochs == 7
    assert study.train.learning_rate == 0.01
    assert study.run.seed_list() == (3, 5)
    assert study.data.flip is False
    assert study.data.root == "some/where"
    assert study.name == "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            MINIMAL.replace("epochs", "epocs"),
            "DIR/study.toml:11: unknown key 'epocs' in [train] "
            "(did you mean 'epochs'?); known: epochs, batch_size,",
        ),
        (MINIMAL.replace("epochs = 4", ""), "train.epochs: required, but missing."),
        (
            MINIMAL.replace("= 4", '= "4"'),
            "DIR/study.toml:11: train.epochs: must be a valid integer, got '4'.",
        ),
        (
            MINIMAL.replace("= 4", "= 0"),
            "train.epochs: must be greater than or equal to 1, got 0.",
        ),
        (
            MINIMAL.replace('"digits"', '"digit"'),
            "DIR/study.toml:8: data.name: must be 'digits', 'cifar10', 'cifar100', "
            "'fashion_mnist', 'svhn', 'imagefolder' or 'imagenet', got 'digit' "
            "(did you mean 'digits'?).",
        ),
        (
            MINIMAL.replace("resnet11", "resnet12"),
            "DIR/study.toml:4: net.template: depth must be",
        ),
        (MINIMAL.replace("[1, 2]", "[]"), "net: needs either cardinality"),
        (MINIMAL.replace("[1, 2]", "[0]"), "cardinality must be at least 1"),
        (MINIMAL.replace("[1, 2]", "[2, 2]"), "cardinality names a value twice"),
        (MINIMAL.replace('"tiny"', '"../tiny"'), "DIR/study.toml:1: name: "),
        (
            MINIMAL.replace('"digits"', '"imagefolder"'),
            'data: name = "imagefolder" needs root',
        ),
        (
            MINIMAL + "\n[run]\nseeds = [1, 1]\n",
            "DIR/study.toml:14: run.seeds: must name at least one seed, none twice",
        ),
        (
            MINIMAL + "\n[run]\nexecutors = 0\n",
            "must be 'auto' or must be greater than or equal to 1, got 0.",
        ),
        (MINIMAL + "\n[run]\ndevice = 'gpu'\n", "run.device: "),
        ("name = ", "study file DIR/study.toml: not valid TOML: "),
        (
            MINIMAL + "step_milestones = [0.75, 0.5]\n",
            "train: step_milestones must rise and lie between 0 and 1",
        ),
        (
            MINIMAL.replace("[net]", "[nets]"),
            "unknown key 'nets' in the study file (did you mean 'net'?)",
        ),
    ],
)
def test_refusal_names_file_line_key_and_rule(
    tmp_path: Path, text: str, message: str
) -> None:
    """Each mistake gets a message that says where it is and what holds there."""
    assert message in refusal(tmp_path, text)


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    """Nobody has to start a study three times to learn of three mistakes."""
    text = MINIMAL.replace("= 4", "= 0").replace('"digits"', '"digit"')
    lines = refusal(tmp_path, text + "momentun = 0.9\n").splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "DIR/study.toml:12",
        "DIR/study.toml:8",
        "DIR/study.toml:11",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "override 'train.epochs': write key=value"),
        ("train.epoch=3", "override train.epoch: unknown key 'epoch' in [train]"),
        ("train.epochs=x", "override train.epochs: train.epochs: must be a valid int"),
        ("name.first=x", "override name.first: name is a value, not a table."),
        ("9=x", "override '9=x': write key=value"),
    ],
)
def test_bad_override_is_named_as_one(
    tmp_path: Path, override: str, message: str
) -> None:
    """A mistake on the command line is not blamed on the file."""
    assert message in refusal(tmp_path, MINIMAL, override)


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A study file that is not there is a plain message."""
    with pytest.raises(InputError, match=r"absent\.toml: cannot be read: No such file"):
        load_study(tmp_path / "absent.toml")


def test_override_cannot_smuggle_a_second_key(tmp_path: Path) -> None:
    """A value with a line break stays one (bad) value."""
    message = refusal(tmp_path, MINIMAL, "train.epochs=1\nnesterov = false")
    assert "override train.epochs" in message


def test_reference_setting_stands_in_for_the_templates(tmp_path: Path) -> None:
    """`net.reference` gives the net that others are matched to."""
    study = load(tmp_path, MINIMAL, "net.reference=2x10d")
    reference = study.net.reference_spec()
    assert reference.name == "resnext11-2x10d-t16"


def test_variants_may_be_settings_or_names(tmp_path: Path) -> None:
    """A list of nets takes short settings of the template and whole names."""
    text = MINIMAL.replace("cardinality = [1, 2]", 'variants = ["2x8d", "resnet20"]')
    names = [spec.name for spec in load(tmp_path, text).net.variant_specs()]
    assert names == ["resnext11-2x8d-t16", "resnet20"]


def test_differences_name_key_and_both_values(tmp_path: Path) -> None:
    """What changed between two studies is told, less what may change."""
    old = load(tmp_path, MINIMAL)
    new = load(tmp_path, MINIMAL, "train.epochs=5", "run.seeds=9", "report.paper=x")
    assert differences(old, new, may_change=("run.seeds", "report")) == (
        "train.epochs: 4 -> 5",
    )


@given(st.text(max_size=40))
def test_any_text_is_a_study_or_an_input_error(text: str) -> None:
    """Whatever stands in a value, the loader never ends in another exception."""
    values = {"train.epochs": text, "net.template": text, "run.seeds": text}
    for key, value in values.items():
        try:
            load_study(STUDIES[0], overrides=[f"{key}={value}"])
        except InputError as error:
            assert str(error)


def test_key_lines_skip_values_that_look_like_keys(tmp_path: Path) -> None:
    """The line of a key is that of its assignment, in its own table."""
    text = '[a]\nx = "y = 1"\n# x = 2\n[b.c]\nx = 3\n'
    assert dict(complaints.key_lines(text)) == {"a": 1, "a.x": 2, "b.c": 4, "b.c.x": 5}


SEARCH = """\
name = "hunt"
kind = "search"

[net]
template = "resnet11-t16"

[search]
axes = ["width=1..9"]
num_trials = 4

[data]
name = "digits"

[train]
epochs = 9
"""


def test_options_of_sampler_and_pruner_are_pinned(tmp_path: Path) -> None:
    """The resolved file has every option that counts, and none that does not."""
    search = load(tmp_path, SEARCH).search
    assert search is not None
    assert (search.startup_trials, search.multivariate) == (10, True)
    assert (search.reduction_factor, search.prune_after_trials) == (3, None)
    text = load(tmp_path, SEARCH).to_toml()
    assert "constant_liar = true" in text
    assert "population_size" not in text


def test_rungs_are_settled_by_thirds(tmp_path: Path) -> None:
    """9 epochs by thirds are compared after 3 and 1; given rungs stay."""
    search = load(tmp_path, SEARCH).search
    assert search is not None
    assert search.resolved(epochs=9).rungs == (1.0, 3.0)
    assert search.resolved(epochs=30).rungs == (1.0, 3.0, 10.0)
    given_rungs = load(tmp_path, SEARCH, "search.rungs=[2.5]").search
    assert given_rungs is not None
    assert given_rungs.resolved(epochs=9).rungs == (2.5,)


def test_confirming_seeds_are_fresh(tmp_path: Path) -> None:
    """No seed of the search is among those that confirm."""
    study = load(tmp_path, SEARCH, "run.seeds=[0, 7]", "search.confirm_seeds=3")
    assert study.confirm_seeds() == (8, 9, 10)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kind=ablation"], '[search] needs kind = "search"'),
        (["search.samplr=tpe"], "unknown key 'samplr' in [search] (did you mean 'samp"),
        (["search.sampler=tp"], "must be 'tpe', 'gp', 'qmc', 'random' or 'nsga2'"),
        (["search.axes=[]"], "search.axes: "),
        (["search.population_size=4"], 'population_size is an option of sampler = "ns'),
        (["search.p_threshold=0.1"], 'p_threshold is an option of pruner = "wilcoxon"'),
        (["search.sampler=nsga2"], "weighs two aims"),
        (["search.also_minimize=params"], 'needs pruner = "none"'),
        (["search.rungs=[3, 1]"], "rungs must rise"),
        (["search.rungs=[9]"], "search.rungs must lie below train.epochs = 9"),
        (["search.rung_unit=seconds"], "needs rungs = [...], in seconds"),
        (["train.epochs=2"], "needs rungs, or train.epochs of 3 or more"),
        (["search.pruner=wilcoxon"], "needs run.seeds of 5 or more"),
        (["search.pruner=none", "search.rungs=[1]"], 'pruner = "none" has no rungs'),
    ],
)
def test_searches_that_cannot_be_are_refused(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    """An option without a use, or a pruner that could never prune, is a message."""
    assert message in refusal(tmp_path, SEARCH, *overrides)


def test_search_needs_its_part(tmp_path: Path) -> None:
    """The kind alone does not say what to search."""
    assert "needs a [search] part" in refusal(
        tmp_path, MINIMAL + "\n[run]\nseeds = 2\n", "kind=search"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.engine=ray"], 'engine = "ray" needs executors = N'),
        (["run.engine=slurm"], 'engine = "slurm" needs executors = N'),
        (["run.ray_address=auto"], 'ray_address needs engine = "ray"'),
        (["run.slurm_cluster=local"], 'slurm_options need engine = "slurm"'),
        (["run.engine=rey"], "must be 'local', 'ray' or 'slurm', got 'rey' (did you"),
    ],
)
def test_options_of_another_engine_are_refused(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    """No option is accepted that would do nothing."""
    assert message in refusal(tmp_path, MINIMAL, *overrides)


PROFILES = """
[profiles.short]
question = "Soon?"

[profiles.short.net]
cardinality = [1, 4, 8]

[profiles.short.train]
epochs = 2

[profiles.long]
train.epochs = 40
run = { seeds = [7, 9] }
"""


def test_profile_is_laid_over_the_file_and_overrides_over_both(tmp_path: Path) -> None:
    """What it names is replaced, lists as a whole; all else is the file's."""
    text = MINIMAL + "learning_rate = 0.3\n" + PROFILES
    base = load(tmp_path, text)
    assert (base.name, base.train.epochs, base.net.cardinality) == ("tiny", 4, (1, 2))
    short = load(tmp_path, text, profile="short")
    assert (short.name, short.question) == ("tiny-short", "Soon?")
    assert short.net.cardinality == (1, 4, 8)
    assert (short.train.epochs, short.train.learning_rate) == (2, 0.3)
    long = load(tmp_path, text, "train.epochs=50", "name=own", profile="long")
    assert (long.name, long.train.epochs, long.run.seed_list()) == ("own", 50, (7, 9))


def test_resolved_study_has_no_profiles(tmp_path: Path) -> None:
    """What is kept with the results is one study, not a choice of them."""
    resolved = load(tmp_path, MINIMAL + PROFILES, profile="short").to_toml()
    assert "profiles" not in resolved
    assert load(tmp_path, resolved).to_toml() == resolved


@pytest.mark.parametrize(
    ("text", "profile", "message"),
    [
        (
            PROFILES,
            "shrt",
            "--profile: DIR/study.toml has no profile 'shrt' (did you mean 'short'?); "
            "it has short, long.",
        ),
        ("", "short", "--profile: DIR/study.toml has no profiles, so none 'short'."),
        (
            PROFILES.replace("epochs = 2", "epochs = 0"),
            "short",
            "DIR/study.toml:20: profile short: train.epochs: must be greater than",
        ),
        (
            PROFILES.replace("epochs = 2", "epocs = 2"),
            None,
            "DIR/study.toml:20: profile short: unknown key 'epocs' in [train] "
            "(did you mean 'epochs'?)",
        ),
        (
            PROFILES.replace("[profiles.short.train]", "[profiles.short.trn]"),
            "long",
            "DIR/study.toml:19: profile short: unknown key 'trn' in the study file",
        ),
        (
            PROFILES.replace("[1, 4, 8]", "[1, 4, 4]"),
            "short",
            "DIR/study.toml:16: profile short: net: cardinality names a value twice",
        ),
        (
            PROFILES.replace("question", "name"),
            None,
            "DIR/study.toml:14: profile short: must not have name: ",
        ),
        ("[profiles]\nshort = 3\n", None, "DIR/study.toml:12: profiles: must be tab"),
    ],
)
def test_mistakes_in_profiles_name_line_and_profile(
    tmp_path: Path, text: str, profile: str | None, message: str
) -> None:
    """A profile is checked as the file is; an unchosen one for unknown keys."""
    assert message in refusal(tmp_path, MINIMAL + text, profile=profile)


def test_what_a_profile_does_not_say_is_not_blamed_on_it(tmp_path: Path) -> None:
    """The line of a mistake is that of the file, or of the override."""
    text = MINIMAL.replace('"digits"', '"digit"') + PROFILES
    message = refusal(tmp_path, text, "train.epochs=0", profile="short")
    assert "DIR/study.toml:8: data.name" in message
    assert "override train.epochs: train.epochs" in message


def test_schema_knows_profiles_and_refuses_unknown_keys_in_them() -> None:
    """Editors complete profiles; nothing is required there."""
    values = tomllib.loads(MINIMAL + PROFILES)
    jsonschema.validate(values, json_schema())
    values["profiles"]["short"]["train"]["epocs"] = 3
    with pytest.raises(jsonschema.ValidationError, match="epocs"):
        jsonschema.validate(values, json_schema())


def test_adaptive_seeds_have_an_end(tmp_path: Path) -> None:
    """Ten seeds at most unless the study says otherwise, written down once settled."""
    study = load(tmp_path, MINIMAL, "run.seeds=adaptive")
    assert (study.run.seeds, study.run.max_seeds) == ("adaptive", 10)
    assert study.run.seed_list() == tuple(range(10))
    text = study.to_toml()
    assert "max_seeds = 10" in text
    assert load(tmp_path, text) == study
    assert load(tmp_path, MINIMAL).run.max_seeds is None


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (MINIMAL, ["run.max_seeds=5"], 'max_seeds needs seeds = "adaptive"'),
        (MINIMAL, ["run.seeds=adaptive", "run.max_seeds=3"], "greater than or equal"),
        (MINIMAL, ["run.seeds=many"], "a list, or \"adaptive\", got 'many'"),
        (SEARCH, ["run.seeds=adaptive"], 'needs kind = "ablation"'),
    ],
)
def test_adaptive_seeds_that_cannot_be(
    tmp_path: Path, text: str, overrides: list[str], said: str
) -> None:
    """A limit without adaptive seeds, too small a one, and searches are refused."""
    with pytest.raises(InputError, match=re.escape(said)):
        load(tmp_path, text, *overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["run.fuse_seeds=2", 'run.engine="slurm"', "run.executors=2"],
            'fuse_seeds needs engine = "local" or "ray"',
        ),
        (["run.fuse_seeds=0"], "run.fuse_seeds"),
        (
            ["run.fuse_seeds=2", 'kind="search"'],
            'run.fuse_seeds needs kind = "ablation"',
        ),
    ],
)
def test_seeds_are_fused_where_that_can_be(
    tmp_path: Path, overrides: list[str], expected: str
) -> None:
    """Slurm jobs and searches take seeds one by one, and the message says so."""
    path = tmp_path / "s.toml"
    path.write_text(MINIMAL)
    with pytest.raises(InputError, match=re.escape(expected)):
        load_study(path, overrides=overrides)


@pytest.mark.parametrize(
    ("seeds", "fused", "expected"),
    [(5, 2, (1, 2)), (5, 3, (1, 2, 3)), (3, 8, (1, 3)), (4, 4, (1, 4)), (3, 1, (1,))],
)
def test_counts_of_seeds_that_are_one_net(
    seeds: int, fused: int, expected: tuple[int, ...]
) -> None:
    """So many at once, the remainder, and one alone after a fault."""
    run = RunConfig.model_validate({"seeds": seeds, "fuse_seeds": fused})
    assert run.fused_counts() == expected
