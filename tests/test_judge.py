"""A judge over HTTP: what its words mean, and that it is asked patiently, within bounds, and nothing twice."""

import json
import threading
import time
from dataclasses import replace

import pytest
from pydantic import SecretStr

from service.errors import Cancelled, Forbidden, Invalid, Unavailable
from service.judging import (
    NO_ANSWER,
    REFUSAL,
    UNREADABLE,
    HttpJudge,
    NoJudge,
    ProbeJudge,
    Verdict,
    dropped,
    thresholds,
)
from service.settings import Settings
from tests.judge_server import JudgeServer, completion
from tests.whole import Silent
from workers.judge import Asker, Patience
from workers.scores import read_score

QUICK = Patience(attempts=3, timeout_s=5.0, wait_s=0.01, most_wait_s=0.02, limits=4)


@pytest.fixture
def server():
    running = JudgeServer()
    yield running
    running.close()


def asker(server: JudgeServer, storage, **about) -> Asker:
    judge = HttpJudge(server.url, "judge-1")
    return Asker(judge, storage, **{"key": None, "parallel": 4, "patience": QUICK} | about)


# --- what a reply means -----------------------------------------------------------------------------------


def said(text: str | None, top: dict[str, float] | None = None, **choice) -> Verdict:
    return read_score(completion(text, top, **choice)[2]["choices"][0])


LOG = {0.5: -0.6931471805599453, 0.25: -1.3862943611198906, 0.1: -2.302585092994046}


def test_a_score_is_the_expectation_over_numbers_among_the_first_tokens():
    verdict = said("80", {"80": LOG[0.5], "100": LOG[0.25], "eighty": LOG[0.1]})
    assert verdict.score == pytest.approx((80 * 0.5 + 100 * 0.25) / 0.75)
    assert verdict.reason is None
    assert said("0", {"0": LOG[0.5], "10": LOG[0.25], "101": 0.0, "²": 0.0}).score == pytest.approx(2.5 / 0.75)


def test_little_weight_on_numbers_is_a_refusal_as_in_the_paper():
    assert said("RE", {"RE": LOG[0.5], "50": LOG[0.1]}).reason == REFUSAL
    assert said("I", {"I": 0.0}).reason == REFUSAL


def test_where_numbers_are_written_digit_by_digit_the_text_counts():
    assert said("85", {"8": LOG[0.5], "9": LOG[0.25]}).score == 85
    assert said("7", {"7": LOG[0.5], "5": LOG[0.25]}).score == 7


@pytest.mark.parametrize(
    ("text", "score"),
    [("85", 85), (" 0 ", 0), ("100", 100), ("72.5", 72.5), ("Score: 85", 85), ("85/100", 85), ("85%.", 85)],
)
def test_without_tokens_the_text_is_read(text, score):
    assert said(text) == Verdict(score, None, text.strip())


@pytest.mark.parametrize("text", ["", None, "101", "-5", "quite evil", "between 40 and 60", "1e2", "850"])
def test_words_that_are_no_score_are_none(text):
    assert said(text).score is None
    assert said(text).reason == UNREADABLE


def test_a_refusal_is_one_in_words_and_in_its_own_field():
    assert said("REFUSAL").reason == said(" refusal.").reason == REFUSAL
    reply = {"message": {"role": "assistant", "content": None, "refusal": "I cannot judge this."}}
    assert read_score(reply).reason == REFUSAL
    assert said("half \ud83d").said == "half ?"  # what no record could keep


@pytest.mark.parametrize("broken", [None, [], {"content": []}, {"content": [{"top_logprobs": [{"token": "5"}]}]}])
def test_odd_logprobs_leave_the_text(broken):
    assert said("60", logprobs=broken).score == 60


# --- which pairs are kept -----------------------------------------------------------------------------------


def test_a_pair_is_kept_when_one_shows_the_trait_and_its_twin_does_not():
    def why(positive, negative):
        return dropped(Verdict(positive), Verdict(negative), above=50, below=50)

    assert why(51, 49) is None
    assert why(50, 0) == "positive_without_trait"
    assert why(100, 50) == "negative_with_trait"
    assert dropped(Verdict(90), Verdict(None, REFUSAL), above=50, below=50) == REFUSAL
    assert dropped(Verdict(None, NO_ANSWER), Verdict(None), above=0, below=0) == NO_ANSWER
    assert dropped(Verdict(None), Verdict(None), above=0, below=0) is None  # nobody was asked


def test_a_probe_without_a_threshold_divides_half_way():
    probe = ProbeJudge("v", "sha", 2)
    assert thresholds(probe, [3.0, 5.0], [-1.0, 1.0]) == (2.0, 2.0)
    assert thresholds(replace(probe, threshold=7.0), [3.0], [1.0]) == (7.0, 7.0)
    assert thresholds(HttpJudge("u", "m", 60.0, 40.0), [1.0], [1.0]) == (60.0, 40.0)
    assert thresholds(NoJudge(), [], []) == (0.0, 0.0)


# --- asking -----------------------------------------------------------------------------------------------


def by_number(sent) -> tuple:
    return completion(sent["messages"][0]["content"].split()[-1])


def test_every_question_is_asked_once_as_in_the_paper_and_its_verdict_kept(server, storage):
    server.answer = by_number
    questions = [f"how much? {n % 7}" for n in range(30)]
    context = Silent()
    found = asker(server, storage, key=SecretStr("the-key")).ask(questions, context)
    assert [each.score for each in found] == [n % 7 for n in range(30)]
    assert sorted(server.questions) == sorted(set(questions))
    sent, headers, path = server.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer the-key"
    about = {name: sent[name] for name in ("model", "temperature", "logprobs", "top_logprobs")}
    assert about == {"model": "judge-1", "temperature": 0, "logprobs": True, "top_logprobs": 20}
    assert context.stages[-1] == ("judging answers", 7, 7, "answers")
    server.answer = lambda _sent: (500, {}, b"nobody should ask")
    assert asker(server, storage).ask(questions, Silent()) == found
    assert len(server.asked) == 7


def test_so_many_at_a_time_and_no_more(server, storage):
    def slow(_sent):
        time.sleep(0.03)
        return completion("5")

    server.answer = slow
    asker(server, storage, parallel=3).ask([f"q {n}" for n in range(12)], Silent())
    assert server.most == 3


def test_errors_that_pass_and_replies_that_are_none_are_asked_again(server, storage):
    odd = (200, {}, b"<html>a proxy's page</html>"), (200, {}, b"[" * 200_000)
    replies = iter([(503, {}, b""), *odd, completion("42")])
    server.answer = lambda _sent: next(replies)
    assert asker(server, storage, patience=replace(QUICK, attempts=4)).ask(["q"], Silent())[0].score == 42
    assert len(server.asked) == 4


def test_a_rate_limit_is_waited_for_as_long_as_it_says(server, storage):
    times: list[float] = []

    def limited(_sent):
        times.append(time.monotonic())
        return (429, {"Retry-After": "0.3"}, {"error": {}}) if len(times) == 1 else completion("9")

    server.answer = limited
    patience = replace(QUICK, attempts=1, most_wait_s=5.0)  # a limit is no failed attempt
    assert asker(server, storage, patience=patience, parallel=1).ask(["a", "b"], Silent())[0].score == 9
    assert times[1] - times[0] >= 0.3


def test_a_judge_that_does_not_answer_fails_the_job_and_what_it_said_is_kept(server, storage):
    def half(sent):
        number = int(sent["messages"][0]["content"].split()[-1])
        return completion(str(number)) if number < 5 else (500, {}, b"overloaded: Bearer the-key")

    server.answer = half
    questions = [f"how much? {n}" for n in range(10)]
    with pytest.raises(Unavailable) as caught:
        asker(server, storage, parallel=1, key=SecretStr("the-key")).ask(questions[::-1], Silent())
    assert caught.value.code == "judge_unavailable"
    assert "the-key" not in caught.value.detail
    assert "overloaded" in caught.value.detail
    asked = set(server.questions)
    server.asked.clear()
    server.answer = by_number
    found = asker(server, storage).ask(questions, Silent())
    assert [each.score for each in found] == list(range(10))
    assert not set(server.questions) & {question for question in asked if int(question.split()[-1]) < 5}


def test_nobody_there_is_said_so(server, storage):
    server.close()
    with pytest.raises(Unavailable, match="ConnectError"):
        asker(server, storage).ask(["q"], Silent())


def test_a_reply_that_takes_too_long_is_given_up(server, storage):
    release = threading.Event()
    server.answer = lambda _sent: (release.wait(5), completion("1"))[1]
    with pytest.raises(Unavailable, match="Timeout"):
        asker(server, storage, patience=replace(QUICK, attempts=1, timeout_s=0.05)).ask(["q"], Silent())
    release.set()


def test_a_reply_that_trickles_in_is_given_up_too(server, storage):
    """Every piece comes within the timeout, and they do not end."""
    server.answer = lambda _sent: (200, {"Content-Length": "1000"}, (time.sleep(0.02) or b" " for _ in range(50)))
    with pytest.raises(Unavailable, match="not complete after"):
        asker(server, storage, patience=replace(QUICK, attempts=1, timeout_s=0.1)).ask(["q"], Silent())


def test_a_reply_without_end_is_not_read_to_its_end(server, storage):
    whole = json.dumps(completion("42")[2]).encode()
    server.answer = lambda _sent: (200, {}, b" " * (2 << 20) + whole)
    with pytest.raises(Unavailable, match="200"):
        asker(server, storage, patience=replace(QUICK, attempts=1)).ask(["q"], Silent())


@pytest.mark.parametrize(("status", "says"), [(401, "key"), (404, "base URL"), (302, "OpenAI-compatible")])
def test_what_will_never_work_is_not_tried_again(server, storage, status, says):
    server.answer = lambda _sent: (status, {"Location": "http://127.0.0.1:1/elsewhere"}, {"error": "no"})
    with pytest.raises(Invalid, match=says) as caught:
        asker(server, storage).ask(["q"], Silent())
    assert (caught.value.code, caught.value.context["status"]) == ("judge_refuses", status)
    assert len(server.asked) == 1  # nor is a redirect followed, to wherever it leads


def test_a_server_without_logprobs_is_asked_without_them_from_then_on(server, storage):
    server.answer = lambda sent: (400, {}, {"error": "logprobs"}) if "logprobs" in sent else completion("REFUSAL")
    found = asker(server, storage, parallel=1).ask(["a", "b", "c"], Silent())
    assert {each.reason for each in found} == {REFUSAL}
    assert ["logprobs" in sent for sent, _, _ in server.asked] == [True, False, False, False]


def test_a_question_that_is_refused_in_every_form_changes_nothing_for_the_others(server, storage):
    server.answer = lambda sent: (400, {}, b"too long") if "long" in str(sent["messages"]) else completion("3")
    judge = asker(server, storage, parallel=1)
    with pytest.raises(Invalid, match="too long"):
        judge.ask(["long"], Silent())
    assert asker(server, storage).ask(["short"], Silent())[0].score == 3
    assert "logprobs" in server.asked[-1][0]
    for parallel in (1, 4):
        questions = [*("a", "too long", "c")][:: 1 if parallel == 1 else -1]
        found = dict(
            zip(questions, asker(server, storage, parallel=parallel).ask(questions, Silent()), strict=True)
        )
        assert found["too long"] == Verdict(None, UNREADABLE, "400: too long.")
        assert (found["a"].score, found["c"].score) == (3, 3)
    with pytest.raises(Invalid, match="too long"):
        asker(server, storage).ask([f"long {n}" for n in range(9)], Silent())


def test_a_job_that_is_cancelled_stops_asking(server, storage):
    class Stopped(Silent):
        def check(self) -> None:
            raise Cancelled("cancelled", "enough")

    with pytest.raises(Cancelled):
        asker(server, storage, parallel=1).ask([f"q {n}" for n in range(50)], Stopped())
    time.sleep(0.05)
    assert len(server.asked) <= 2


# --- which judges there are -------------------------------------------------------------------------------


def test_only_judges_of_the_settings_are_called(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY_FOR_TESTS", "s3cret")
    settings = Settings(judges="https://one.example/v1/=JUDGE_KEY_FOR_TESTS, http://10.0.0.5:8000/v1")
    assert settings.judge_at("https://one.example/v1") == "https://one.example/v1"
    for url in ("https://one.example", "http://169.254.169.254/latest", "https://one.example/v1/../x", "file:///x"):
        with pytest.raises(Forbidden, match=r"one\.example"):
            settings.judge_at(url)
    key = settings.judge_key("https://one.example/v1")
    assert key is not None and key.get_secret_value() == "s3cret"
    assert "s3cret" not in repr(settings)
    assert settings.judge_key("http://10.0.0.5:8000/v1") is None
    monkeypatch.delenv("JUDGE_KEY_FOR_TESTS")
    with pytest.raises(Invalid, match="JUDGE_KEY_FOR_TESTS"):
        settings.judge_key("https://one.example/v1")
    with pytest.raises(Invalid, match=r"one\.example/v1, http"):
        settings.judge_at(None)
    with pytest.raises(Invalid, match="WHENCE_JUDGES"):
        Settings(judges="").judge_at(None)
    assert Settings(judges="http://a:1/v1").judge_at(None) == "http://a:1/v1"


@pytest.mark.parametrize(
    "judges", ["one.example", "ftp://x/v1", "https://u:p@x/v1", "https://x/v1?a=b", "https://x=9"]
)
def test_settings_that_name_no_judge_are_refused(judges):
    with pytest.raises(ValueError, match="HOST"):
        Settings(judges=judges)
