"""Calls that are wrong in themselves: exit code 2."""

import pytest

from faults import FAST, brief, named


@pytest.mark.parametrize(
    ("words", "says"),
    named(
        ((), "PROMPT"),
        (("",), "prompt is empty"),
        ((" \t\n",), "prompt is empty"),
        (("a fox", ""), "prompt is empty"),
        (("x" * 20_001,), "20000"),
        (("\udcff",), "UTF-8"),
        (("-", "-"), "stdin"),
        (("a fox", "--colour"), "--colour"),
        (("a fox", "--negative", "\udcff"), "UTF-8"),
        (("a fox", "-o", "\udcff.png"), "UTF-8"),
        (("a fox", "--negative", "dog", "-g", "1"), "--negative"),
        (("a fox", "-g", "nan"), "--guidance"),
        (("a fox", "-g", "inf"), "--guidance"),
        (("a fox", "-g", "0"), "--guidance"),
        (("a fox", "-g", "-3"), "--guidance"),
        (("a fox", "-g", "much"), "--guidance"),
        (("a fox", "--steps", "0"), "--steps"),
        (("a fox", "--steps", "-1"), "--steps"),
        (("a fox", "--steps", "100000"), "--steps"),
        (("a fox", "-o", "s3://bucket/x.png"), "is a URL"),
        (("a fox", "--steps", "2.5"), "--steps"),
        (("a fox", "--solver", "ddim"), "--solver"),
        (("a fox", "--dtype", "int8"), "--dtype"),
        (("a fox", "--device", "gpu"), "--device"),
        (("a fox", "--device", ""), "--device"),
        (("a fox", "--device", "meta"), "--device"),
        (("a fox", "--device", "cuda:99"), "--device"),
        (("a fox", "-n", "0"), "--count"),
        (("a fox", "-n", "-2"), "--count"),
        (("a fox", "-n", "100001"), "--count"),
        (("a fox", "-n", "few"), "--count"),
        (("a fox", "-s", "-1"), "--seed"),
        (("a fox", "-s", "4294967296"), "4294967296"),
        (("a fox", "-s", "4294967295", "-n", "2"), "4294967296"),
        (("a fox", "-s", "9" * 5000), "--seed"),
        (("a fox", "-s", "8..1"), "--seed"),
        (("a fox", "-s", "0..4294967295"), "--seed"),
        (("a fox", "-s", "1,,2"), "--seed"),
        (("a fox", "-s", "1,1"), "--seed"),
        (("a fox", "-s", "1.5"), "--seed"),
        (("a fox", "-s", ""), "--seed"),
        (("a fox", "-s", "1..3", "-n", "2"), "--count"),
        (("a fox", "-s", "1,5", "-n", "2"), "--count"),
    ),
)
def test_a_wrong_call_is_refused(refused, model, words, says):
    refused(2, "-m", str(model), *words, says=(says,))


@pytest.mark.parametrize(
    "size",
    ["0", "-512", "31", "0x512", "512x0", "1024x", "x512", "1x1x1", "big", "", "5.5", "1e3", "²"],
)
def test_what_is_no_resolution_is_refused(refused, model, size):
    refused(2, "a fox", "-m", str(model), "--res", size, says=("--res",), hint="1280x720")


@pytest.mark.parametrize(
    "size", ["4096", "4k", "511", "4096x4096", "999999", "9999999999", "999999x999999"]
)
def test_a_model_is_not_asked_for_more_than_it_draws(refused, model, size):
    refused(2, "a fox", "-m", str(model), "--res", size, hint="hint:")


@pytest.mark.parametrize("size", ["4096", "4k"])
def test_a_model_that_can_is_named_though_no_weights_are_here(refused, no_weights, size):
    said = refused(2, "a fox", "-m", "sana-0.6b-1024", "--res", size, says=("1024",))
    assert "--model sana-1.6b-4k" in said


@pytest.mark.parametrize("size", ["700", "8192", "99999"])
def test_a_size_that_no_model_draws_is_refused(refused, size):
    refused(2, "a fox", "--res", size, says=(size,), hint="4096")


@pytest.mark.parametrize(
    "aspect", ["0:1", "1:0", "0.0:1", "a:b", "16", "16:9:4", "-16:9", "16/9", "", "inf:1", "1:nan"]
)
def test_what_is_no_aspect_ratio_is_refused(refused, model, aspect):
    refused(2, "a fox", "-m", str(model), "--ar", aspect, says=("--ar",), hint="16:9")


@pytest.mark.parametrize("fit", ["trained", "exact"])
@pytest.mark.parametrize(
    "aspect", ["9999:0.0001", "0.0001:9999", f"9999:0.{'0' * 307}1"], ids=brief
)
def test_an_absurd_aspect_ratio_is_refused(refused, model, aspect, fit):
    refused(2, "a fox", "-m", str(model), "--ar", aspect, "--fit", fit, *FAST)


def test_an_aspect_ratio_does_not_go_with_an_exact_size(refused, model):
    refused(2, "a fox", "-m", str(model), "--res", "512x512", "--ar", "1:1", says=("--ar",))
