"""Where a webhook may go, what an answer means, when it is tried again, and when an endpoint is left alone."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.webhooks.addresses import Address, why_refused
from service.core.webhooks.breaker import FAILURES, LONGEST, Breaker
from service.core.webhooks.models import Owner
from service.core.webhooks.schedule import (
    LONGEST_RETRY_AFTER,
    SCHEDULE,
    Answer,
    Decision,
    Fault,
    State,
    decide,
    read_retry_after,
)
from service.core.webhooks.urls import MAX_URL, Target, UrlRefused, judge_answers, judge_url, read_pairs

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
ALLOWED = [
    "1.1.1.1", "8.8.8.8", "93.184.215.14", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0",
    "126.255.255.255", "128.0.0.1", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0", "191.255.255.255",
    "192.0.1.0", "192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0", "198.51.99.255", "203.0.112.255",
    "203.0.114.0",
    "223.255.255.255", "168.63.129.15",
    "2606:4700::1111", "2a00:1450:4001:82a::200e", "2001:4860:4860::8888", "2400:cb00::1", "2001:200::1", "2c0f::1",
    "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2606:4700::5efe:808:808",
]  # fmt: skip
REFUSED = [
    # IPv4: each special range at both of its ends
    "0.0.0.0", "0.255.255.255", "10.0.0.0", "10.255.255.255", "100.64.0.0", "100.127.255.255", "100.100.100.200",
    "127.0.0.1", "127.0.0.0", "127.255.255.255", "169.254.0.0", "169.254.169.254", "169.254.170.2", "169.254.255.255",
    "172.16.0.0", "172.31.255.255", "192.0.0.0", "192.0.0.9", "192.0.0.192", "192.0.0.255", "192.0.2.1", "192.31.196.1",
    "192.52.193.1", "192.88.99.1", "192.168.0.0", "192.168.255.255", "192.175.48.1", "198.18.0.0", "198.19.255.255",
    "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "168.63.129.16",
    # IPv6
    "::", "::1", "::2", "100::1", "100:0:0:1::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fdff::1", "fe80::1",
    "fe80::1%1", "2606:4700::1111%eth0", "febf::1", "fec0::1", "ff02::1", "ff0e::1", "2001:db8::1", "3fff::1",
    "2001:2::1", "2001:10::1", "2001:20::1", "2001:1ff::1", "3ffe::1", "2620:4f:8000::1", "4000::1", "8000::1", "1::1",
    "200::1", "400::1", "e000::1",
    # IPv4 inside IPv6: mapped, compatible, translated, NAT64 of both kinds, 6to4, Teredo, ISATAP
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:0.0.0.0", "::ffff:168.63.129.16",
    "::127.0.0.1", "::8.8.8.8", "::ffff:0:127.0.0.1", "::ffff:0:8.8.8.8",
    "64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b:1::8.8.8.8", "64:ff9b:1::127.0.0.1",
    "64:ff9b:0:1::8.8.8.8", "2002:7f00:1::", "2002:a00:1::1", "2002:808:808::1", "2001::1", "2001:0:4136:e378::1",
    "2606:4700::5efe:127.0.0.1", "2606:4700::200:5efe:10.0.0.1", "2606:4700::200:5efe:192.168.1.1",
    "fe80::5efe:8.8.8.8",
]  # fmt: skip


class TestAddresses:
    @pytest.mark.parametrize("text", ALLOWED)
    def test_global_unicast_may_be_sent_to(self, text: str) -> None:
        assert why_refused(_address(text)) is None

    @pytest.mark.parametrize("text", REFUSED)
    def test_nothing_else_may(self, text: str) -> None:
        assert why_refused(_address(text))

    @given(st.ip_addresses(v=4))
    def test_no_ipv4_is_allowed_that_python_knows_not_to_be_global(self, address: IPv4Address) -> None:
        if why_refused(address) is None:
            assert address.is_global
            assert not address.is_multicast
            assert not address.is_reserved

    @given(st.ip_addresses(v=6))
    def test_no_ipv6_is_allowed_outside_of_what_is_handed_out(self, address: IPv6Address) -> None:
        if why_refused(address) is None:
            assert (
                str(address.exploded)[0] in "23" or address.ipv4_mapped or address.exploded.startswith("0064:ff9b:0000")
            )

    @given(st.ip_addresses(v=4))
    def test_an_address_that_is_refused_is_refused_in_every_disguise(self, address: IPv4Address) -> None:
        """And one that is allowed is, in the two that are the address itself."""
        low = int(address)
        for prefix in ("::ffff:0:0", "64:ff9b::"):
            disguised = IPv6Address(int(IPv6Address(prefix)) | low)
            assert (why_refused(disguised) is None) == (why_refused(address) is None), disguised
        for prefix in ("::", "::ffff:0:0:0", "64:ff9b:1::", "2606:4700::5efe:0:0", "2606:4700::200:5efe:0:0"):
            disguised = IPv6Address(int(IPv6Address(prefix)) | low)
            assert why_refused(disguised) or why_refused(address) is None, disguised
        assert why_refused(IPv6Address((0x2002 << 112) | (low << 80)))
        assert why_refused(IPv6Address((0x20010000 << 96) | (low ^ 0xFFFFFFFF)))


class TestUrls:
    @pytest.mark.parametrize(
        ("url", "host", "port", "path", "authority"),
        [
            ("https://hooks.example.com", "hooks.example.com", 443, "/", "hooks.example.com"),
            ("HTTPS://Hooks.Example.COM/A?b=C", "hooks.example.com", 443, "/A?b=C", "hooks.example.com"),
            ("https://a.example:8443/x", "a.example", 8443, "/x", "a.example:8443"),
            ("https://a.example?q=1", "a.example", 443, "/?q=1", "a.example"),
            ("https://a.example:443/", "a.example", 443, "/", "a.example"),
            ("https://xn--bcher-kva.example/%C3%A4", "xn--bcher-kva.example", 443, "/%C3%A4", "xn--bcher-kva.example"),
            ("https://8.8.8.8/", "8.8.8.8", 443, "/", "8.8.8.8"),
            ("https://[2606:4700:0::1111]:8443/", "2606:4700::1111", 8443, "/", "[2606:4700::1111]:8443"),
            ("https://a.example/@b:c//d", "a.example", 443, "/@b:c//d", "a.example"),
        ],
    )
    def test_plain_ones_are_read(self, url: str, host: str, port: int, path: str, authority: str) -> None:
        target = judge_url(url)

        assert (target.host, target.port, target.path, target.authority) == (host, port, path, authority)

    @pytest.mark.parametrize(
        "url",
        [
            "", "hooks.example.com", "//a.example/", "ftp://a.example/", "http://a.example/", "https://", "https:///x",
            "https:/a.example", "javascript:alert(1)", "file:///etc/passwd", "https://a.example:80/",
            "https://a.example:22/", "https://a.example:0/", "https://a.example:65536/", "https://a.example:+443/",
            "https://a.example:443:443/", "https://a.example:/", "https://a.example/#f", "https://a.example#",
            "https://u@a.example/", "https://u:p@a.example/", "https://a.example@127.0.0.1/", "https://@a.example/",
            "https://a.example\\@127.0.0.1/", "https://a.example\\.b/", "https://a.example/\\b",
            "https://a.example /", " https://a.example/", "https://a.exa\tmple/", "https://a.example/\n",
            "https://a.example/\x00", "https://bücher.example/", "https://a。example/", "https://ⓐ.example/",
            "https://a.example/ä", "https://a.example./", "https://.example/", "https://a..example/", "https://a_b.example/",
            "https://-a.example/", "https://a%2eexample/", "https://" + "a" * 64 + ".example/",
            "https://a.example/" + "x" * MAX_URL,
            "https://localhost/", "https://LOCALHOST/", "https://localhost./", "https://x.localhost/", "https://redis/",
            "https://metadata/", "https://metadata.google.internal/", "https://printer.local/", "https://x.home.arpa/",
            "https://127.0.0.1/", "https://127.1/", "https://127.0.0.1./", "https://0x7f.1/", "https://0x7f000001/",
            "https://2130706433/", "https://017700000001/", "https://0177.0.0.1/", "https://127.0.0.01/", "https://0/",
            "https://1.2.3.4.5/", "https://a.0x7f/", "https://a.1/", "https://256.1.1.1/", "https://10.0.0.1/",
            "https://169.254.169.254/latest/meta-data/", "https://192.168.1.1/", "https://[::1]/", "https://[::]/",
            "https://[::ffff:127.0.0.1]/", "https://[::ffff:7f00:1]/", "https://[64:ff9b::7f00:1]/", "https://[fe80::1%25eth0]/",
            "https://[fd00::1]/", "https://[::1", "https://::1/", "https://[a.example]/", "https://[]/", "https://[1.1.1.1]/",
        ],
    )  # fmt: skip
    def test_everything_else_is_refused_with_what_would_be_right(self, url: str) -> None:
        with pytest.raises(UrlRefused, match=r"^should ") as refusal:
            judge_url(url)
        assert len(str(refusal.value)) < 200

    def test_what_the_operator_has_named_is_not_judged_and_nothing_near_it_is_let_through(self) -> None:
        pairs = read_pairs("127.0.0.1:9000, Receiver:80,[::1]:9001")
        for url in ("http://127.0.0.1:9000/x", "https://127.0.0.1:9000/", "http://receiver/", "http://[0:0::1]:9001/"):
            target = judge_url(url, excepted=pairs)
            assert target.excepted
            assert judge_answers(target, [ip_address("127.0.0.1")]) is None
        for url in ("http://127.0.0.1:9001/", "http://127.0.0.2:9000/", "http://localhost:9000/", "https://receiver/",
                    "http://u@127.0.0.1:9000/", "http://0x7f.1:9000/", "http://a.receiver:80/"):  # fmt: skip
            with pytest.raises(UrlRefused):
                judge_url(url, excepted=pairs)

    @pytest.mark.parametrize(
        "text", ["a", "a:", ":1", "a:0", "a:65536", "a:b", "http://a:1", "a:1;b:2", "[::1:1", "a b:1"]
    )
    def test_a_pair_is_a_host_and_a_port(self, text: str) -> None:
        with pytest.raises(ValueError, match="should"):
            read_pairs(text)
        assert read_pairs("") == read_pairs(" , ") == frozenset()

    @pytest.mark.parametrize(
        ("answers", "allowed"),
        [
            (["8.8.8.8"], True), (["8.8.8.8", "2606:4700::1111"], True), (["127.0.0.1"], False),
            (["8.8.8.8", "127.0.0.1"], False), (["2606:4700::1111", "::ffff:10.0.0.1"], False),
        ],
    )  # fmt: skip
    def test_every_answer_of_a_name_is_judged(self, answers: Sequence[str], allowed: bool) -> None:
        target: Target = judge_url("https://a.example/")

        why = judge_answers(target, [_address(answer) for answer in answers])
        assert (why is None) == allowed
        assert allowed or str(why).startswith(f"{ip_address(answers[-1])}: ")


class TestAnswers:
    @pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
    def test_2xx_is_success(self, status: int) -> None:
        assert _decide(status) == Decision(state=State.DELIVERED)

    @pytest.mark.parametrize(
        ("status", "error"),
        [(301, "redirect"), (302, "redirect"), (304, "redirect"), (307, "redirect"), (308, "redirect"), (400, "status"),
         (404, "status"), (429, "status"), (500, "status"), (503, "status"), (199, "status"), (600, "status")],
    )  # fmt: skip
    def test_nothing_else_is(self, status: int, error: str) -> None:
        decision = _decide(status)
        assert (decision.state, decision.error, decision.disable) == (State.PENDING, error, False)

    def test_410_is_the_end_of_the_endpoint(self) -> None:
        assert _decide(410) == Decision(state=State.DEAD, error=Fault.GONE, disable=True)

    def test_the_schedule_is_the_contract_s_with_jitter_and_then_a_dead_letter(self) -> None:
        planned = [0, 5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400]
        assert [wait.total_seconds() for wait in SCHEDULE] == planned
        for tries in range(1, 10):
            waits = [_wait(decide(Answer(status=500), tries=tries, now=NOW, chance=c)) for c in (0.0, 0.5, 0.999)]
            assert waits[1] == SCHEDULE[tries]
            assert SCHEDULE[tries] * 0.8 <= waits[0] < waits[1] < waits[2] <= SCHEDULE[tries] * 1.2
        last = decide(Answer(error=Fault.TIMEOUT), tries=10, now=NOW, chance=0.5)
        assert (last.state, last.error, last.wait) == (State.DEAD, Fault.TIMEOUT, None)
        assert decide(Answer(error=Fault.EVENT_GONE), tries=1, now=NOW, chance=0.5).state is State.DEAD

    @pytest.mark.parametrize(
        ("header", "seconds"),
        [
            ("120", 120), (" 7 ", 7), ("0", None), ("999999999", 86400), ("-5", None), ("1.5", None), ("soon", None),
            ("", None),
            ("1" * 50, None), ("٣", None), (None, None),
            (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90),
            (format_datetime(NOW - timedelta(seconds=90), usegmt=True), None),
            (format_datetime(NOW + timedelta(days=90), usegmt=True), 86400),
            ("Thu, 01 Jan 2026 12:01:30 -0000", 90), ("Thu, 99 Foo 2026 99:99:99 GMT", None),
        ],
    )  # fmt: skip
    def test_retry_after_is_seconds_or_a_date_and_has_bounds(self, header: str | None, seconds: int | None) -> None:
        read = read_retry_after(header, now=NOW)

        assert read == (None if seconds is None else timedelta(seconds=seconds))
        assert read is None or read <= LONGEST_RETRY_AFTER

    @given(st.text(max_size=40))
    def test_no_retry_after_breaks_anything(self, header: str) -> None:
        read = read_retry_after(header, now=NOW)
        assert read is None or timedelta(0) < read <= LONGEST_RETRY_AFTER

    def test_nobody_comes_back_before_the_time_that_was_asked_for(self) -> None:
        asked = Answer(status=503, retry_after="120")
        decision = decide(asked, tries=1, now=NOW, chance=0.0)
        assert (decision.wait, decision.hold) == (timedelta(seconds=120), timedelta(seconds=120))
        assert _wait(decide(asked, tries=4, now=NOW, chance=0.5)) == SCHEDULE[4], "the schedule's own wait is longer"
        assert decide(Answer(status=500, retry_after="120"), tries=1, now=NOW, chance=0.0).hold is None


class TestBreaker:
    PAUSE = timedelta(seconds=60)

    def allowed(self, breaker: Breaker, now: float, *, in_flight: int = 0) -> int:
        return breaker.allows(in_flight=in_flight, most=4, now=now)

    def broken(self, *, failures: int = FAILURES, now: float = 100.0) -> Breaker:
        breaker = Breaker(pause=self.PAUSE)
        for _ in range(failures):
            breaker.failed(now)
        return breaker

    def test_a_few_failures_change_nothing(self) -> None:
        breaker = self.broken(failures=FAILURES - 1)
        assert breaker.is_closed
        assert [self.allowed(breaker, 100.0, in_flight=n) for n in (0, 3, 4, 9)] == [4, 1, 0, 0]

    def test_many_in_a_row_open_it_and_then_one_at_a_time_goes_through(self) -> None:
        breaker = self.broken()
        assert self.allowed(breaker, 159.9) == 0
        assert [self.allowed(breaker, 160.0, in_flight=n) for n in (0, 1)] == [1, 0]

    def test_each_further_failure_doubles_the_pause_up_to_a_bound(self) -> None:
        now, breaker, pauses = 100.0, self.broken(), []
        for _ in range(8):
            began = now
            while self.allowed(breaker, now) == 0:
                now += 1.0
            pauses.append(now - began)
            breaker.failed(now)
        assert pauses == [60, 120, 240, 480, 960, 960, 960, 960]
        assert max(pauses) == 60 * LONGEST

    def test_one_success_closes_it(self) -> None:
        breaker = self.broken()
        breaker.succeeded()
        assert (breaker.is_closed, breaker.is_fresh, self.allowed(breaker, 100.0)) == (True, True, 4)

    def test_who_asks_to_be_left_alone_is(self) -> None:
        breaker = Breaker(pause=self.PAUSE)
        breaker.hold(100.0, timedelta(seconds=30))
        assert (self.allowed(breaker, 129.9), self.allowed(breaker, 130.0)) == (0, 4)
        breaker.hold(200.0, timedelta(days=9))
        assert self.allowed(breaker, 200.0 + 60 * LONGEST) == 4


def test_an_owner_is_a_tenant_or_a_service() -> None:
    for wrong in ({}, {"tenant": "acme", "service_id": "svc_1"}):
        with pytest.raises(ValueError, match="tenant or to a service"):
            Owner(**wrong)


def _address(text: str) -> Address:
    return ip_address(text)


def _decide(status: int) -> Decision:
    return decide(Answer(status=status), tries=1, now=NOW, chance=0.5)


def _wait(decision: Decision) -> timedelta:
    assert decision.wait is not None
    return decision.wait
