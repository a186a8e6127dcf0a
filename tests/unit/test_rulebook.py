"""The policy's file: what is shipped is sound, what a user writes lies over it, and what is wrong is told by its name."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from resilient.core.messages import Finding
from resilient.core.rules import HARMLESS, Book, Limits, Rules
from resilient.errors import ConfigError
from resilient.rulebook import lay, load, shipped

ROOT = Path(__file__).parents[2]


def over(text):
    return lay(shipped(), tomllib.loads(text), "mine.toml")


def ruling(rules, **facts):
    return Book(rules).ruling(Finding(seq=0, **facts))


def test_what_is_shipped_is_sound():
    rules = shipped()
    assert rules.limits == Limits(), "the defaults in the code are those of the file"
    assert set(rules.classes) == {"ignore", "user", "app-restart", "gpu-reset", "replace", "cordon"}
    assert all(rule.source for rule in rules.rules), "every rule names its source"
    assert not set(rules.proof) & set(rules.hearsay)


def test_every_probe_of_ours_is_proof_or_hearsay():
    """A probe that nobody has thought of moves nobody: it has to stand in one of the lists."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("entry-points", {}).get("resilient.probes", {})
    rules = shipped()
    known = (*rules.proof, *rules.hearsay)
    strange = [name for name in points if not any(name == k or name.startswith(f"{k}-") for k in known)]
    assert strange == []


def test_a_users_file_lies_over_it(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        """
        kinds = ["lamp"]
        proof = ["lamps"]
        [classes]
        cordon = "watch"
        [limits]
        cordons_per_s = 1
        [rule.xid-94]
        class = "gpu-reset"
        [rule.lamp]
        kind = "lamp"
        class = "replace"
        threshold = 2
        """
    )
    rules = load(str(file))
    assert (rules.classes["cordon"], rules.classes["replace"]) == ("watch", "evict")
    assert (rules.limits.cordons_per_s, rules.limits.reduced_per_s) == (1.0, 0.01)
    changed = next(rule for rule in rules.rules if rule.name == "xid-94")
    assert (changed.class_, changed.codes, changed.kind) == ("gpu-reset", ("94",), "xid")
    assert ruling(rules, kind="xid", code="94", class_="app-restart", probe="kernel-log").verdict == "evict"
    lamp = ruling(rules, kind="lamp", probe="lamps")
    assert (lamp.class_, lamp.verdict, lamp.rule.threshold, lamp.proof) == ("replace", "evict", 2, True)
    assert len(rules.rules) == len(shipped().rules) + 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("clases = 1", ["'clases'", "'classes'"]),
        ("[classes]\nreplaces = 'evict'", ["'replaces'", "'replace'"]),
        ("[classes]\nreplace = 'evicted'", ["'evicted'", "'evict'"]),
        ("[classes]\nuser = 'evict'", ["'user'", "'evict'", "no node"]),
        ("[limits]\nbefore = 3", ["'before'", "'before_s'"]),
        ("[limits]\nbefore_s = 'x'", ["before_s", "float"]),
        ("[rule.a]\nkind = 'xids'", ["'xids'", "'xid'", "[rule.a]"]),
        ("[rule.a]\nkinds = 'xid'", ["'kinds'", "'kind'"]),
        ("[rule.a]\nkind = 'xid'\nclass = 'gpu_reset'", ["'gpu_reset'", "'gpu-reset'"]),
        ("[rule.a]\nkind = 'xid'\nverdict = 'cordoned'", ["'cordoned'", "'cordon'"]),
        ("[rule.a]\nkind = 'xid'\nclass = 'user'\nverdict = 'evict'", ["'user'", "'evict'"]),
        ("[rule.a]\nclass = 'user'", ["every finding", "kind"]),
        ("[rule.a]\nkind = 'xid'\nthreshold = 0", ["threshold"]),
        ("[rule.a]\nkind = 'xid'\nthreshold = 'x'", ["threshold", "int"]),
        ("[rule.a]\nkind = 'replicas_differ'\nverdict = 'evict'", ["'replicas_differ'", "halt"]),
        ("rule = 3", ["rule", "table"]),
        ("[rule]\na = 3", ["[rule.a]", "table"]),
        ("proof = 'nvml'", ["proof", "array"]),
    ],
)
def test_what_is_wrong_is_told(text, words):
    with pytest.raises(ConfigError) as error:
        over(text)
    assert all(word in str(error.value) for word in ["mine.toml", *words]), str(error.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load(str(tmp_path / "none.toml"))
    (tmp_path / "bad.toml").write_text("x = = 3")
    with pytest.raises(ConfigError, match="TOML expected"):
        load(str(tmp_path / "bad.toml"))


def test_the_rule_that_names_most_wins_and_of_equals_the_later():
    rules = over(
        """
        [rule.all-xids]
        kind = "xid"
        class = "replace"
        [rule.mine]
        kind = "xid"
        codes = ["94"]
        class = "cordon"
        """
    )
    assert ruling(rules, kind="xid", code="7", class_="ignore").rule.name == "all-xids"
    assert ruling(rules, kind="xid", code="94").rule.name == "mine"


def test_without_a_book_all_is_watched():
    assert ruling(Rules(), kind="xid", code="79", class_="replace", probe="kernel-log").verdict == "watch"


def test_probes_are_told_by_name_and_family():
    rules = shipped()
    assert ruling(rules, kind="ecc", class_="gpu-reset", probe="nvml-ecc").proof
    assert not ruling(rules, kind="ecc", class_="gpu-reset", probe="nvmlx").proof
    assert not ruling(rules, kind="ecc", class_="gpu-reset", probe="worker-log").proof


@pytest.mark.parametrize("class_", ["user", "ignore"])
def test_nothing_moves_for_what_is_the_programs(class_):
    """Whatever a rule says: one that fits both a user's and another class cannot be refused when it is read."""
    rules = over("[rule.a]\nkind = 'cuda-error'\nverdict = 'evict'")
    assert ruling(rules, kind="cuda-error", class_=class_, probe="kernel-log").verdict in HARMLESS
