from __future__ import annotations

import re
import string

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from plait.errors import AddressError
from plait.hub import Reference, parse_reference
from tests.every import every


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    """No text may be taken for a folder that happens to lie where the tests are started."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("org/repo", {"repo": "org/repo"}),
        ("a=org/repo", {"name": "a", "repo": "org/repo"}),
        ("org/repo@main", {"repo": "org/repo", "revision": "main"}),
        ("org/repo/checkpoint-2874", {"repo": "org/repo", "subfolder": "checkpoint-2874"}),
        (
            "other=org/repo@rev/checkpoint-2874",
            {"name": "other", "repo": "org/repo", "revision": "rev", "subfolder": "checkpoint-2874"},
        ),
        ("org/repo@v1.0/a/b c/[d]=e", {"repo": "org/repo", "revision": "v1.0", "subfolder": "a/b c/[d]=e"}),
        ("org/repo@refs/pr/3", {"repo": "org/repo", "revision": "refs/pr/3"}),
        ("org/repo@refs/pr/3/sub", {"repo": "org/repo", "revision": "refs/pr/3", "subfolder": "sub"}),
        ("org/repo@refs/convert/parquet/x", {"repo": "org/repo", "revision": "refs/convert/parquet", "subfolder": "x"}),
        ("./a", {"path": "./a"}),
        ("n.1_-=./a", {"name": "n.1_-", "path": "./a"}),
        ("../a@b/c", {"path": "../a@b/c"}),
        ("/abs/a", {"path": "/abs/a"}),
        ("~/a", {"path": "~/a"}),
        ("./a=b", {"path": "./a=b"}),
        ("here/it/is", {"path": "./here/it/is"}),
        ("x=here", {"name": "x", "path": "./here"}),
        (".hidden", {"path": ".hidden"}),
    ],
)
def test_both_forms_are_read(text, fields, tmp_path):
    (tmp_path / "here" / "it" / "is").mkdir(parents=True)
    reference = parse_reference(text)
    assert reference == Reference(**fields)
    assert parse_reference(reference.spec) == reference
    assert str(reference) == reference.spec


def test_a_folder_hides_the_repository_of_its_name_but_not_with_a_revision(tmp_path):
    assert parse_reference("org/repo").repo == "org/repo"
    (tmp_path / "base" / "org" / "repo").mkdir(parents=True)
    assert parse_reference("org/repo", base=tmp_path / "base").path == "./org/repo"
    assert parse_reference("org/repo@main", base=tmp_path / "base").repo == "org/repo"
    assert parse_reference("org/repo").repo == "org/repo"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"'' names no place. Allowed: \[name=\]PATH .* or \[name=\]org/repo\[@revision\]\[/subfolder\]"),
        ("a=", "'a=' names no place"),
        ("a= ", "'a= ' names no place"),
        ("./a\0b", "names no place"),
        ("cdoe", r"there is no 'cdoe' in .*needs its owner. Did you mean 'code'\? Allowed: \[name=\]PATH"),
        ("word@main", "there is no 'word@main' in"),
        ("C:\\a", "there is no"),
        ("org/", "there is no|cannot be a repository"),
        ("x" * 5000, "there is no"),
        ("org/repo@", "'' cannot be a revision"),
        ("org/repo@refs", "'refs' cannot be a revision: give a branch, tag or commit without slashes, refs/pr/N"),
        ("org/repo@refs/heads/x", "'refs' cannot be a revision"),
        ("org/repo@refs/pr/x", "'refs' cannot be a revision"),
        ("org/repo@refs/convert/", "'refs/convert/' cannot be a revision"),
        ("org/repo@a..b", "'a..b' cannot be a revision"),
        ("org/repo@-x", "'-x' cannot be a revision"),
        ("org/repo@a@b", "'a@b' cannot be a revision"),
        ("org/repo/sub@rev", "holds '@': the revision comes before it, as in org/repo@revision/subfolder"),
        ("or--g/repo", "the Hub allows no '--', no '..' and no '.git' at the end"),
        ("org/repo.git", "'org/repo.git' cannot be a repository: the Hub allows"),
        ("-org/repo", "neither starts nor ends with"),
        ("org/" + "r" * 97, "1 to 96 letters"),
        ("my name=org/repo", "'my name=org/repo': the name 'my name' must start with a letter or digit"),
        ("-a=org/repo", "the name '-a' must start"),
        ("https://huggingface.co/org/repo", "is a web address. Write 'org/repo'."),
        ("https://hf.co/org/repo/tree/v1/a/b/", "is a web address. Write 'org/repo@v1/a/b'."),
        ("hf://org/repo@v1/a", "is a web address. Write 'org/repo@v1/a'."),
        ("https://x", "is a web address. Allowed: "),
    ],
)
def test_other_texts_are_refused_with_what_to_write(text, message, tmp_path):
    (tmp_path / "code").mkdir()
    with pytest.raises(AddressError, match=message):
        parse_reference(text)


def test_everything_wrong_is_told_at_once():
    with pytest.raises(AddressError) as caught:
        parse_reference("or..g/repo@a b/../c")
    assert str(caught.value).splitlines() == [
        "'or..g/repo@a b/../c' is not a reference: 3 problems",
        "  - 'or..g/repo' cannot be a repository: the Hub allows no '--', no '..' and no '.git' at the end.",
        "  - 'a b' cannot be a revision: give a branch, tag or commit without slashes, refs/pr/N or refs/convert/NAME.",
        "  - the subfolder '../c' must not hold '.' or '..': it has to stay inside the repository.",
    ]


def test_a_repository_without_owner_is_read_only_where_it_is_allowed():
    assert parse_reference("gpt2@v1", allow_bare=True) == Reference(repo="gpt2", revision="v1")
    assert parse_reference("org/repo/sub", allow_bare=True) == Reference(repo="org/repo", subfolder="sub")
    with pytest.raises(AddressError, match="needs its owner"):
        parse_reference("gpt2")


CLIMBING = [
    "..",
    "../x",
    "x/..",
    "x/../../y",
    "/etc",
    "x//y",
    "x/",
    "/",
    ".",
    "x/./y",
    "\\x",
    "x\\..\\y",
    "~",
    "~/x",
    "x/~u",
    "a\nb",
    "",
]


@every("subfolder", CLIMBING)
@every("place", ["org/repo", "org/repo@main", "n=org/repo@refs/pr/1"])
def test_subfolders_that_climb_out_are_refused(subfolder, place):
    with pytest.raises(AddressError, match=r"the subfolder .*(stay inside|empty part|must not hold)"):
        parse_reference(f"{place}/{subfolder}")
    with pytest.raises(ValidationError, match="the subfolder"):
        Reference(repo="org/repo", subfolder=subfolder)


@given(st.lists(st.sampled_from(["..", ".", "", "a", "b\\c", "~", "\0", "\x7f", "…", "."])).map("/".join))
def test_no_subfolder_leads_out(subfolder):
    try:
        reference = Reference(repo="org/repo", subfolder=subfolder)
    except ValidationError:
        return
    parts = (reference.subfolder or "").split("/")
    assert set(parts) <= {"a", "…"}


@every(
    "fields",
    [
        {},
        {"path": "./a", "repo": "org/repo"},
        {"path": "./a", "revision": "main"},
        {"path": "./a", "subfolder": "x"},
        {"path": ""},
        {"path": "./a\0"},
        {"name": "a b", "path": "./a"},
        {"name": "", "path": "./a"},
        {"repo": "a/b/c"},
        {"repo": "org/repo", "revision": "a/b"},
        {"repo": "org/repo", "word": "x"},
    ],
)
def test_a_reference_cannot_be_made_of_what_cannot_be_written(fields):
    with pytest.raises(ValidationError):
        Reference(**fields)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("code=org/repo/final", "code"),
        ("org/repo", "repo"),
        ("org/repo@v1", "repo"),
        ("org/repo/maths", "maths"),
        ("org/repo@v1/checkpoint-123", "repo-checkpoint-123"),
        ("org/repo/run7/checkpoint-5", "run7-checkpoint-5"),
        ("org/repo/adapter/checkpoint-5", "repo-adapter-checkpoint-5"),
        ("org/repo/final_model", "repo-final_model"),
        ("org/final", "final"),
        ("org/repo/a b/[c] (d)/final", "c-d-final"),
        ("org/repo/…", "adapter"),
        ("./runs/code/", "code"),
        ("./runs/code/final", "code-final"),
        ("./runs/code/../maths", "maths"),
        ("./runs/code/adapter/", "code-adapter"),
        ("./trained/phases/code/adapter/", "code"),
        ("./phases/code/adapter/checkpoint-9", "code-adapter-checkpoint-9"),
        (".", "place"),
        ("./final", "place-final"),
        ("~/a/b", "b"),
        ("~nobody-of-that-name/b", "b"),
        ("/", "adapter"),
        ("./.hidden", "hidden"),
        ("./ümlaut", "umlaut"),
        ("./styles/pixel.v2.safetensors", "pixel.v2"),
        ("./styles/ink.GGUF", "ink"),
        ("./ink/pytorch_lora_weights.safetensors", "ink-pytorch_lora_weights"),
        ("./ink/adapter_model.bin", "ink-adapter_model"),
        ("org/repo/lora/weights.safetensors", "repo-lora-weights"),
    ],
)
def test_default_names(text, name, tmp_path):
    (tmp_path / "place").mkdir()
    assert parse_reference(text).default_name(base=tmp_path / "place") == name


word = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=8)
names = st.none() | word.filter(lambda w: w[0] not in "._-")
repo_parts = word.filter(lambda w: w[0] not in ".-" and w[-1] not in ".-" and ".." not in w and "--" not in w)
repos = st.tuples(repo_parts, repo_parts).map("/".join).filter(lambda r: not r.endswith(".git"))
plain_revisions = word.filter(lambda w: w[0] not in ".-" and ".." not in w and w != "refs")
revisions = st.none() | plain_revisions | st.integers(0, 99).map("refs/pr/{}".format)
revisions |= plain_revisions.map("refs/convert/{}".format)
folder_names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\\~@", exclude_categories=["C", "Z"]) | st.just(" "), min_size=1
)
subfolders = st.none() | st.lists(folder_names, min_size=1, max_size=4).map("/".join)
hub_references = st.builds(dict, name=names, repo=repos, revision=revisions, subfolder=subfolders)
paths = st.builds(dict, name=names, path=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(hub_references | paths)
@example({"path": "~="})
@example({"path": "a=b"})
@example({"name": "a", "path": "a=./b"})
@example({"repo": "org/repo", "subfolder": "a=b"})
@example({"repo": "org/repo", "revision": "refs/pr/3", "subfolder": "4"})
def test_a_reference_is_read_back_from_its_text(fields):
    try:
        reference = Reference(**fields)
    except ValidationError:
        assume({".", ".."} & set((fields.get("subfolder") or "").split("/")))
        return
    assert parse_reference(reference.spec) == reference
    assert Reference.model_validate_json(reference.model_dump_json()) == reference
    name = reference.default_name()
    assert Reference(name=name, path="./x").name == name


@relaxed
@given(st.text())
def test_any_text_is_read_or_refused(text):
    try:
        reference = parse_reference(text)
    except AddressError:
        with pytest.raises(AddressError, match=re.escape(repr(text))):
            parse_reference(text)
    else:
        assert parse_reference(reference.spec) == reference


def test_names_of_other_scripts_are_kept_apart():
    names = [
        parse_reference(f"./{text}").default_name() for text in ("模型", "数据", "模型-v2", "数据-v2", "modèle", "Ünïcode")
    ]
    assert len(set(names)) == len(names)
    assert names[4:] == ["modele", "Unicode"]
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) for name in names)
    assert names[0] == parse_reference("./模型").default_name()
    assert parse_reference("./a b").default_name() == "a-b"
