"""Names of models that are none, and models that are not here."""

import pytest

from faults import DIT, FAST, assert_polite, brief


def test_an_unknown_model_brings_a_suggestion(refused):
    refused(2, "a fox", "-m", "sana-0.6b-1025", hint="did you mean sana-0.6b-1024")


@pytest.mark.parametrize(
    "name", ["zzz", "", "no/such/folder", "x" * 5000, "~no-such-user/x", "\udcff"], ids=brief
)
def test_what_is_no_model_is_refused(refused, name):
    refused(2, "a fox", "-m", name, *FAST, hint="hint:")


def test_a_file_of_another_network_is_no_model(refused, model):
    refused(
        1, "a fox", "-m", str(model / DIT), says=("is of no released Sana model",), hint="folder"
    )


def test_an_empty_folder_is_no_model(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(1, "a fox", "-m", str(tmp_path / "empty"), says=("model_index.json",), hint="layout")


@pytest.mark.parametrize("words", [(), ("-q",), ("--json",)], ids=brief)
def test_absent_weights_bring_the_command_that_fetches_them(refused, no_weights, words):
    said = refused(5, "a fox", "-m", "sana-0.6b-1024", "--offline", *words)
    assert "sana models pull sana-0.6b-1024" in said


def test_absent_weights_are_found_out_in_a_real_process(process, here, no_weights):
    run = process("generate", "a fox")
    assert (run.returncode, run.stdout) == (5, b"")
    assert_polite(run.stderr.decode(), hint="sana models pull sana-0.6b-1024")
    assert not list(here.iterdir())


def test_a_download_that_stopped_half_way_is_no_model(refused, no_weights):
    from sana_cli.weights.catalogue import known_models

    own = known_models()["sana-0.6b-1024"].sources[0]
    cache = no_weights / "hub" / f"models--{own.repo.replace('/', '--')}"
    (cache / "snapshots" / own.revision / "transformer").mkdir(parents=True)
    refused(5, "a fox", "-m", "sana-0.6b-1024", says=("not on this machine",), hint="pull")
