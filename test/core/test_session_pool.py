"""The KV pool: what is kept, what is dropped first, and that what comes back is what was computed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engine_core.backends.kv_pool import BLOCK_TOKENS, pool_tokens
from engine_core.config import EngineConfig
from engine_core.errors import ConfigurationError
from engine_core.request import ChatMessage, GenerationRequest, SamplingParams
from engine_core.serving.session_pool import KVKind, Rank, SessionPool
from fakes import END, text_ids

SLOT_TOKENS = 512


class Store:
    """Slots and pool whose KV is (token id, number of the computation): two computations never have the same bits."""

    has_states = False

    def __init__(self, num_tokens: int, num_slots: int = 1) -> None:
        self.num_slots, self.pool_tokens = num_slots, num_tokens
        self.slots = np.full((num_slots, SLOT_TOKENS, 2), -1, dtype=np.int64)
        self.pool = np.full((num_tokens, 2), -1, dtype=np.int64)
        self.copied: list[int] = []  # tokens of each copy
        self._numbers = itertools.count()

    def compute(self, slot: int, position: int, ids: np.ndarray) -> None:
        for index, token in enumerate(ids):
            self.slots[slot, position + index] = token, next(self._numbers)

    def save_kv(self, slot, position, place, count) -> None:
        assert count > 0 and place + count <= self.pool_tokens
        self.pool[place : place + count] = self.slots[slot, position : position + count]
        self.copied.append(count)

    def load_kv(self, slot, position, place, count) -> None:
        assert count > 0 and place + count <= self.pool_tokens
        self.slots[slot, position : position + count] = self.pool[place : place + count]
        self.copied.append(count)


PLAIN = KVKind()


def make(num_tokens: int, num_slots: int = 1, *, prompts: int = 0) -> tuple[SessionPool, Store]:
    store = Store(num_tokens, num_slots)
    return SessionPool(store, num_prompts=prompts, prompt_tokens=128, keeps_conversations=True), store


def ids_of(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, count).astype(np.int32)


def answer(
    pool, store, prompt, *, free=None, session="", kind=PLAIN, num_answer=9
) -> tuple[int, np.ndarray, np.ndarray]:
    """One request from its placing to its end; returns the cached tokens, all ids and their KV at the end."""
    slot, cached = pool.place(prompt, list(range(store.num_slots)) if free is None else free, kind)
    assert (store.slots[slot, :cached, 0] == prompt[:cached]).all()
    ids = np.concatenate([prompt, ids_of(int(prompt.sum()), num_answer)])
    store.compute(slot, cached, ids[cached:])
    pool.set_live(slot, ids)
    pool.keep_conversation(slot, len(prompt), session)
    check(pool, store)
    return cached, ids, store.slots[slot, : len(ids)].copy()


def check(pool: SessionPool, store: Store) -> None:
    """Every entry's blocks hold its ids, and each block has as many users as entries that use it."""
    users = np.zeros(store.pool_tokens // BLOCK_TOKENS, dtype=int)
    for entry in pool._entries:
        if entry.blocks:
            assert len(entry.blocks) == -(-len(entry.ids) // BLOCK_TOKENS) and len(set(entry.blocks)) == len(
                entry.blocks
            )
            places = np.concatenate([np.arange(b * BLOCK_TOKENS, (b + 1) * BLOCK_TOKENS) for b in entry.blocks])
            assert (store.pool[places[: len(entry.ids)], 0] == entry.ids).all()
            users[entry.blocks] += 1
    assert (users == pool._num_users).all()


def go_on(ids: np.ndarray, seed: int, count: int = 20) -> np.ndarray:
    return np.concatenate([ids, ids_of(seed, count)])


def test_a_conversation_comes_back_bit_for_bit_in_one_copy_and_only_what_is_new_is_saved():
    pool, store = make(512)
    _, first, kv = answer(pool, store, ids_of(1, 100))
    answer(pool, store, ids_of(2, 50))
    store.copied.clear()
    cached, second, kv2 = answer(pool, store, go_on(first, 3))
    assert cached == len(first) and (kv2[:cached] == kv).all()
    assert store.copied[0] == len(first) and sum(store.copied[1:]) == len(second) - len(first)
    answer(pool, store, ids_of(4, 50))
    cached, _, kv3 = answer(pool, store, go_on(second, 5))
    assert cached == len(second) and (kv3[:cached] == kv2).all()


def test_it_goes_on_in_its_slot_without_a_copy_back():
    pool, store = make(512)
    _, first, _ = answer(pool, store, ids_of(1, 100))
    store.copied.clear()
    cached, second, _ = answer(pool, store, go_on(first, 2))
    assert cached == len(first) and sum(store.copied) == len(second) - len(first)


def test_what_is_asked_once_drops_no_conversation_in_whatever_number():
    pool, store = make(256)
    _, first, _ = answer(pool, store, ids_of(1, 60))
    _, second, _ = answer(pool, store, go_on(first, 2))
    for seed in range(300):
        cached, _, _ = answer(pool, store, ids_of(1000 + seed, 40))
        assert cached == 0
    cached, _, _ = answer(pool, store, go_on(second, 3))
    assert cached == len(second)


def test_the_same_question_again_is_no_conversation():
    pool, store = make(256)
    for _ in range(3):
        answer(pool, store, ids_of(1, 40))
    assert [entry.rank for entry in pool._entries if entry.blocks] == [Rank.ONCE]


def test_a_new_conversation_replaces_one_that_nobody_goes_on_with():
    """Even where all the room is taken by conversations: at its second turn it is known to be one."""
    pool, store = make(256)
    for seed in range(3):
        _, ids, _ = answer(pool, store, ids_of(seed, 40))
        answer(pool, store, go_on(ids, 100 + seed, 15))
    _, ids, _ = answer(pool, store, ids_of(50, 60))
    answer(pool, store, ids_of(51, 60))
    _, ids, _ = answer(pool, store, go_on(ids, 52))
    answer(pool, store, ids_of(53, 60))
    assert answer(pool, store, go_on(ids, 54))[0] == len(ids)


def test_the_least_recently_used_conversation_is_dropped_first_and_a_session_after_all_others():
    pool, store = make(4 * 64)
    ends = {}
    for name, session in (("a", ""), ("pinned", "anna"), ("b", "")):
        _, ids, _ = answer(pool, store, ids_of(ord(name[0]), 30), session=session)
        _, ends[name], _ = answer(pool, store, go_on(ids, ord(name[0]) + 1, 10), session=session)
    _, ends["a"], _ = answer(pool, store, go_on(ends["a"], 1, 3), num_answer=1)  # used last: in 64 places still
    _, ids, _ = answer(pool, store, ids_of(200, 60))
    _, ids, _ = answer(pool, store, go_on(ids, 201, 30))  # needs more than is free
    assert {name: pool._find(go_on(end, 9), PLAIN)[1] == len(end) for name, end in ends.items()} == {
        "a": True, "pinned": True, "b": False
    }  # fmt: skip
    assert pool.kept_tokens("anna") == len(ends["pinned"])
    pool.forget("anna")
    answer(pool, store, ids_of(300, 20))
    assert pool.kept_tokens("anna") == 0 and pool._find(go_on(ends["pinned"], 9), PLAIN)[1] == 0


def test_a_fork_goes_on_without_taking_the_kv_of_its_origin():
    pool, store = make(1024)
    _, first, _ = answer(pool, store, ids_of(1, 100), session="anna")
    store.copied.clear()
    cached, second, _ = answer(pool, store, go_on(first, 2), session="fork")
    assert cached == len(first) and sum(store.copied) < len(second) - len(first) + BLOCK_TOKENS  # the rest is shared
    assert (pool.kept_tokens("anna"), pool.kept_tokens("fork")) == (len(first), len(second))
    cached, third, _ = answer(pool, store, go_on(first, 3), session="anna")
    assert cached == len(first)
    pool.forget("fork")
    assert answer(pool, store, go_on(third, 4), session="anna")[0] == len(third)
    assert pool.kept_tokens("fork") == 0


def test_an_adapter_has_entries_and_slots_of_its_own():
    pool, store = make(512)
    _, first, _ = answer(pool, store, ids_of(1, 100), kind=KVKind("house"))
    assert answer(pool, store, go_on(first, 2))[0] == 0
    assert answer(pool, store, go_on(first, 2), kind=KVKind("other"))[0] == 0
    assert answer(pool, store, go_on(first, 2), kind=KVKind("house"))[0] == len(first)


def test_what_grows_beyond_its_rope_has_other_kv_and_goes_on_as_the_same_conversation():
    pool, store = make(1024)
    _, first, _ = answer(pool, store, ids_of(1, 100), session="anna")
    cached, second, _ = answer(pool, store, go_on(first, 2), session="anna", kind=KVKind(long_rope=True))
    assert cached == 0 and pool.kept_tokens("anna") == len(second)
    assert [(entry.rank, entry.session) for entry in pool._entries] == [(Rank.ONCE, ""), (Rank.SESSION, "anna")]
    assert answer(pool, store, go_on(second, 3), session="anna", kind=KVKind(long_rope=True))[0] == len(second)
    assert answer(pool, store, go_on(first, 4))[0] == len(first)  # as long as there is room


def test_branches_share_the_blocks_they_have_in_common():
    pool, store = make(1024)
    _, trunk, kv = answer(pool, store, ids_of(1, 200))
    used = pool.num_used
    _, left, left_kv = answer(pool, store, go_on(trunk, 2))
    answer(pool, store, ids_of(99, 40))
    cached, right, right_kv = answer(pool, store, go_on(trunk, 3))
    assert cached == len(trunk) and (left_kv[: len(trunk)] == kv).all() and (right_kv[: len(trunk)] == kv).all()
    assert pool.num_used <= used + 3 * 64
    for branch, bits in ((left, left_kv), (right, right_kv)):
        answer(pool, store, ids_of(98, 40))
        cached, _, again = answer(pool, store, go_on(branch, 4))
        assert cached == len(branch) and (again[:cached] == bits).all()


def test_a_changed_answer_takes_the_place_of_the_old_one():
    """A template may leave out of the history what the model thought."""
    pool, store = make(1024)
    _, first, _ = answer(pool, store, ids_of(1, 100), num_answer=60)
    cached, second, _ = answer(pool, store, go_on(first[:105], 2))
    assert cached == 105
    answer(pool, store, ids_of(3, 40))
    assert answer(pool, store, go_on(second, 4))[0] == len(second)
    assert sum(len(entry.ids) > 100 and entry.rank > Rank.ONCE for entry in pool._entries) == 1


def test_system_prompts_stay_whatever_else_comes_and_share_their_blocks_with_conversations():
    pool, store = make(2 * 128 + 512, prompts=2)
    systems = [ids_of(seed, 120) for seed in range(3)]

    def talk(system: np.ndarray, seed: int) -> int:
        prompt = np.concatenate([system, ids_of(seed, 20)])
        slot, cached = pool.place(prompt, [0])
        store.compute(slot, cached, prompt[cached:])
        pool.keep_prompt(slot, system)
        pool.set_live(slot, prompt)
        pool.keep_conversation(slot, len(prompt))
        check(pool, store)
        return cached

    assert [talk(systems[0], 10), talk(systems[1], 11), talk(systems[0], 12)] == [0, 0, 120]
    before = pool.num_used
    talk(systems[0], 13)
    assert pool.num_used - before <= 3 * BLOCK_TOKENS
    for seed in range(40):
        answer(pool, store, ids_of(500 + seed, 150))
    assert talk(systems[1], 14) == 120 and talk(systems[2], 15) == 0
    assert talk(systems[0], 16) == 0, "the third took the place of the one used least recently"


def test_any_order_of_requests_finds_what_was_computed():
    """Conversations in a pool too small for all, on three slots of which some are taken; every bit is one that was
    computed for these ids, and what a conversation had at its end comes back whole while it is kept."""
    random = np.random.default_rng(0)
    pool, store = make(1200, num_slots=3, prompts=1)
    ends = {name: ids_of(name, 30) for name in range(6)}
    bits: dict[int, np.ndarray] = {}
    hits = 0
    for turn in range(400):
        name = int(random.integers(6))
        free = sorted(random.choice(3, random.integers(1, 4), replace=False).tolist())
        if random.random() < 0.3:
            answer(pool, store, ids_of(10_000 + turn, int(random.integers(10, 60))), free=free)
            continue
        if len(ends[name]) > 400:
            ends[name] = ids_of(turn, 30)
            bits.pop(name, None)
        prompt = go_on(ends[name], turn, int(random.integers(1, 25)))
        cached, ends[name], kv = answer(pool, store, prompt, free=free, session="s" if name == 0 else "")
        if name in bits and cached >= len(bits[name]):
            assert (kv[: len(bits[name])] == bits[name]).all()
            hits += 1
        bits[name] = kv
    assert hits > 100


def test_the_pool_has_room_for_prompts_and_for_whole_conversations():
    config = EngineConfig("x", prompt_cache_entries=3, prompt_cache_tokens=50)
    assert pool_tokens(config, 512, 1000) == 3 * 64
    assert pool_tokens(config, 40, 1000) == 3 * 48
    with_sessions = EngineConfig("x", prompt_cache_entries=0, session_memory=2)
    assert pool_tokens(with_sessions, 512, 1024) == 2048
    assert pool_tokens(with_sessions, 512, 512) == 4096  # half the bytes a token: twice the tokens
    with pytest.raises(ConfigurationError, match=r"session_memory is 2 MiB.* set it to 4 or more"):
        pool_tokens(with_sessions, 4096, 1024)


# --- through the engine ---------------------------------------------------------------------------------------


def ask(engine, messages, **sampling):
    request = GenerationRequest(
        "r", messages=tuple(messages), sampling=SamplingParams(**{"max_new_tokens": 12, **sampling})
    )
    return engine.answer(request)


def test_two_conversations_of_fourteen_turns_compute_a_turn_at_a_time(open_engine):
    """With a yes-or-no question between any two turns, in a pool that the conversations nearly fill."""
    engine = open_engine([*text_ids("Sure."), END], max_context=2048, pool_tokens=1440,
                         config={"session_memory": 1, "prompt_cache_entries": 0})  # fmt: skip
    talks: dict[str, list] = {name: [ChatMessage("system", f"You are {name}.")] for name in ("Anna", "Ben")}
    known = dict.fromkeys(talks, 0)
    for turn in range(14):
        for name, messages in talks.items():
            messages.append(ChatMessage("user", f"turn {turn} of {name}"))
            result = ask(engine, messages)
            assert result.cached_tokens >= known[name], (turn, name)
            known[name] = result.prompt_tokens + len(result.token_ids)
            messages.append(ChatMessage("assistant", result.text))
            ask(engine, [ChatMessage("user", f"Is {turn} {name} a question? yes or no")])
    assert all(tokens > 400 for tokens in known.values())


@pytest.mark.parametrize("sampling", [{}, {"seed": 7, "temperature": 1.0}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("tokens", [176, 2048])
def test_the_text_is_the_same_with_and_without_the_pool(open_engine, sampling, tokens):
    """The fake model's tokens depend on every position: a wrong one changes the text. 176 tokens drop conversations."""

    def texts(**config) -> list[str]:
        engine = open_engine(max_context=1024, pool_tokens=tokens, config={**config, "prompt_cache_entries": 0})
        talks: list[list[ChatMessage]] = [[], [], []]
        found = []
        for turn, index in enumerate([0, 1, 2, 0, 0, 1, 2, 1, 0, 2]):
            talks[index].append(ChatMessage("user", f"{index}: {turn}"))
            found.append(ask(engine, talks[index], **sampling).text)
            talks[index].append(ChatMessage("assistant", found[-1]))
        return found

    assert texts(session_memory=1) == texts() == texts(session_memory=1, reproducible=False)


def test_a_seeded_request_computes_its_prompt_and_keeps_it_for_others(open_engine):
    engine = open_engine(config={"session_memory": 1, "prompt_cache_entries": 0})
    first = ask(engine, [ChatMessage("user", "hello")], seed=5, temperature=1.0)
    ask(engine, [ChatMessage("user", "something else")])
    messages = [ChatMessage("user", "hello"), ChatMessage("assistant", first.text), ChatMessage("user", "and now?")]
    assert ask(engine, messages, seed=5, temperature=1.0).cached_tokens == 0
    ask(engine, [ChatMessage("user", "something else")])
    assert ask(engine, messages).cached_tokens >= first.prompt_tokens


def test_without_session_memory_conversations_are_not_kept(open_engine):
    engine = open_engine()
    ask(engine, [ChatMessage("user", "hello, this is a question")])
    ask(engine, [ChatMessage("user", "a longer one that has nothing in common with it")])
    assert "save" not in {call[0] for call in engine._backend.calls} and engine.pool.num_used == 0
