"""The states that a crash may leave on a device, and how to visit the telling ones first.

    C1  Each sector has its durable value or any value that it had since the last completed barrier.
    C2  The size is the durable one or any that the device had since; what lies past it is gone.
    C3  In garbage mode a 4 KiB block that a write in flight touched may hold garbage as a whole.

A state is named by a *spec*, ``kind:index:seed``. The kind is a family of states (every prefix of the
changes, each write torn...), the index counts within it. A spec can be turned back into its state without
visiting the others, given the same changes in flight.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from random import Random

from jqcow.testing.changes import InFlight, Write
from jqcow.testing.device import SimulatedDevice

GARBAGE_BLOCK_BYTES = 4096
DIGEST_BYTES = 16

GarbageRule = Callable[[int, int], bool]
"""``rule(offset, length)``: may a torn write of this range leave garbage in the 4 KiB blocks under it?"""

_MASK = 256**DIGEST_BYTES - 1
_DUPLICATES_IN_A_ROW = 256
"""So many repeated states in a row, and the random families count as used up."""


def content_digest(content: bytes, *, sector_bytes: int = 512) -> bytes:
    """Return the digest by which states are told apart: equal if and only if bytes and size are.

    It is a sum over sectors, so that a state that differs in few sectors costs few hashes.
    """
    total = 0
    for start in range(0, len(content), sector_bytes):
        value = content[start : start + sector_bytes].ljust(sector_bytes, b"\0")
        total += _sector_token(start // sector_bytes, value)
    return _digest(total, len(content))


def _sector_token(sector: int, value: bytes) -> int:
    if value.count(0) == len(value):
        return 0
    hashed = blake2b(value, digest_size=DIGEST_BYTES, salt=sector.to_bytes(16, "big"))
    return int.from_bytes(hashed.digest(), "big")


def _digest(total: int, size_bytes: int) -> bytes:
    text = (total & _MASK).to_bytes(DIGEST_BYTES, "big") + size_bytes.to_bytes(8, "big")
    return blake2b(text, digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True)
class CrashState:
    """One state of the disk after a crash. It is compact; :meth:`content` builds the bytes.

    ``in_flight`` tells whether any change was in flight when the power went.
    """

    kind: str
    index: int
    seed: int
    size_bytes: int
    digest: bytes
    in_flight: bool
    _space: CrashSpace = field(repr=False, compare=False)
    _choice: tuple[int, ...] = field(repr=False, compare=False)
    _garbage: tuple[int, ...] = field(repr=False, compare=False)
    beside: CrashState | None = field(default=None, repr=False)

    @property
    def spec(self) -> str:
        """The name of the state, for :meth:`CrashSpace.state`; of two devices, that of both."""
        own = f"{self.kind}:{self.index}:{self.seed}"
        return own if self.beside is None else f"{own}+{self.beside.spec}"

    def content(self) -> bytes:
        """Return the bytes on the disk."""
        return self._space.content_of(self)

    def data_sectors(self) -> set[int]:
        """Return the indices of the sectors that are not holes."""
        return self._space.data_sectors_of(self)


@dataclass
class _Recipe:
    """A state in the making: a value for each uncertain sector, a size, and the blocks of garbage."""

    choice: list[int]
    size_bytes: int
    garbage: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Part:
    """The sectors ``start`` to ``stop`` of one change, counted within the change, reached the disk."""

    number: int
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class _Family:
    """A kind of state. ``count`` is None if there is no end to them."""

    kind: str
    count: int | None
    build: Callable[[int], _Recipe]

    def order(self, seed: int) -> Iterator[int]:
        """Yield the indices, shuffled: a small budget must not see early changes only."""
        if self.count is None:
            return itertools.count()
        if self.kind == "exhaustive":
            return iter(range(self.count))
        indices = list(range(self.count))
        Random(f"{seed}/{self.kind}").shuffle(indices)
        return iter(indices)


@dataclass(frozen=True)
class _Torn:
    """A write of which only the sectors before or after ``cut`` landed, with all others or with none."""

    number: int
    cut: int
    head_lands: bool
    rest_lands: bool


class CrashSpace:
    """All crash states of one moment.

    ``garbage_allowed`` turns on garbage mode for the writes that it accepts. ``seed`` chooses what the random
    families do, and the garbage.
    """

    def __init__(
        self, moment: InFlight, *, seed: int = 0, garbage_allowed: GarbageRule | None = None
    ) -> None:
        self.seed = seed
        self._moment = moment
        self._sector_bytes = moment.sector_bytes
        self._collect_sectors()
        relevant = set(self._spans) | {number for number, _ in moment.sizes[1:]}
        self._numbers = [change.number for change in moment.changes if change.number in relevant]
        self._all_sizes = sorted({size for _, size in moment.sizes})
        self._garbage_blocks = self._find_garbage_blocks(garbage_allowed)
        self._torn = list(self._torn_writes())
        self._sums: dict[int, tuple[int, list[list[int]]]] = {}
        self._families = {family.kind: family for family in self._make_families()}

    # What the space holds

    @property
    def state_count(self) -> int:
        """How many states there are without garbage; some may be equal where the size cuts sectors off."""
        return math.prod(map(len, self._values)) * len(self._all_sizes)

    def state(self, spec: str) -> CrashState:
        """Return the state that ``spec`` names. Raises ``ValueError`` if it is not of this space."""
        kind, index, seed = spec.split(":")
        if int(seed) != self.seed:
            raise ValueError(f"{spec} belongs to seed {seed}, not {self.seed}")
        family = self._families.get(kind)
        if family is None or (family.count is not None and not 0 <= int(index) < family.count):
            raise ValueError(f"no such crash state here: {spec}")
        return self._state(family, int(index))

    def states(self, budget: int) -> Iterator[CrashState]:
        """Yield at most ``budget`` states, no two alike: all of them if they are few, else a mixture."""
        seen: set[bytes] = set()
        duplicates = 0
        for state in self._candidates(budget):
            if len(seen) >= budget or duplicates >= _DUPLICATES_IN_A_ROW:
                return
            if state.digest in seen:
                # Only the endless families may be cut short: the others end by themselves.
                duplicates += self._families[state.kind].count is None
                continue
            duplicates = 0
            seen.add(state.digest)
            yield state

    def _candidates(self, budget: int) -> Iterator[CrashState]:
        garbage_count = self._families["garbage"].count or 0
        if self.state_count + garbage_count <= budget:
            return self._round_robin(["exhaustive", "garbage"])
        return self._round_robin([kind for kind in self._families if kind not in ("exhaustive", "killed")])

    def _round_robin(self, kinds: Iterable[str]) -> Iterator[CrashState]:
        """Take one state of each family in turn, so that a small budget sees every kind."""
        running = [(self._families[kind], self._families[kind].order(self.seed)) for kind in kinds]
        while running:
            still_running = []
            for family, order in running:
                index = next(order, None)
                if index is not None:
                    still_running.append((family, order))
                    yield self._state(family, index)
            running = still_running

    # The families

    def _make_families(self) -> Iterator[_Family]:
        changes = len(self._numbers)
        yield _Family("none", 1, lambda _: self._land([]))
        yield _Family("all", 1, lambda _: self._land(self._whole(self._numbers)))
        yield _Family("killed", 1, lambda _: self._land(self._whole(self._numbers)))
        yield _Family("prefix", max(0, changes - 1), self._prefix)
        yield _Family("single", changes, lambda i: self._land(self._whole([self._numbers[i]])))
        yield _Family("without", changes, self._without)
        yield _Family("torn", len(self._torn), self._tear)
        yield _Family("suffix", max(0, changes - 1), self._suffix)
        sizes = 2 * len(self._all_sizes) if len(self._all_sizes) > 1 else 0
        yield _Family("size", sizes, self._vary_size)
        yield _Family("garbage", 2 * len(self._garbage_blocks), self._garble)
        yield _Family("changes", None, self._random_changes)
        yield _Family("sectors", None, self._random_sectors)
        yield _Family("exhaustive", self.state_count, self._enumerate)

    def _prefix(self, index: int) -> _Recipe:
        return self._land(self._whole(self._numbers[: index + 1]))

    def _suffix(self, index: int) -> _Recipe:
        return self._land(self._whole(self._numbers[index + 1 :]))

    def _without(self, index: int) -> _Recipe:
        return self._land(self._whole(self._numbers[:index] + self._numbers[index + 1 :]))

    def _tear(self, index: int) -> _Recipe:
        torn = self._torn[index]
        part = _Part(torn.number, 0, torn.cut) if torn.head_lands else _Part(torn.number, torn.cut)
        if not torn.rest_lands:
            return self._land([part])
        return self._land([part if number == torn.number else _Part(number) for number in self._numbers])

    def _vary_size(self, index: int) -> _Recipe:
        recipe = self._land(self._whole(self._numbers if index % 2 else []))
        recipe.size_bytes = self._all_sizes[index // 2]
        return recipe

    def _garble(self, index: int) -> _Recipe:
        recipe = self._land(self._whole(self._numbers if index % 2 else []))
        block = self._garbage_blocks[index // 2]
        # A garbage block past the end would be no garbage: the file is large enough for it.
        if recipe.size_bytes <= block * GARBAGE_BLOCK_BYTES:
            recipe.size_bytes = self._all_sizes[-1]
        recipe.garbage = (block,)
        return recipe

    def _random_changes(self, index: int) -> _Recipe:
        random = Random(f"{self.seed}/changes/{index}")
        share = random.choice((0.1, 0.3, 0.5, 0.7, 0.9))
        parts = [self._random_part(n, random) for n in self._numbers if random.random() < share]
        recipe = self._land(parts)
        if random.random() < 0.5:
            recipe.size_bytes = random.choice(self._all_sizes)
        if self._garbage_blocks and random.random() < 0.25:
            recipe.garbage = (random.choice(self._garbage_blocks),)
        return recipe

    def _random_part(self, number: int, random: Random) -> _Part:
        length = len(self._spans.get(number, ()))
        if length < 2 or random.random() < 0.7:
            return _Part(number)
        start, stop = sorted(random.sample(range(length + 1), 2))
        return _Part(number, start, stop)

    def _random_sectors(self, index: int) -> _Recipe:
        random = Random(f"{self.seed}/sectors/{index}")
        choice = [random.randrange(len(values)) for values in self._values]
        return _Recipe(choice, random.choice(self._all_sizes))

    def _enumerate(self, index: int) -> _Recipe:
        index, size_index = divmod(index, len(self._all_sizes))
        choice = []
        for values in self._values:
            index, value_index = divmod(index, len(values))
            choice.append(value_index)
        return _Recipe(choice, self._all_sizes[size_index])

    @staticmethod
    def _whole(numbers: Iterable[int]) -> list[_Part]:
        return [_Part(number) for number in numbers]

    def _land(self, parts: Iterable[_Part]) -> _Recipe:
        """Return the state in which these parts of changes landed, in this order, and nothing else."""
        choice = [0] * len(self._values)
        size_bytes = self._moment.sizes[0][1]
        sizes = dict(self._moment.sizes[1:])
        for part in parts:
            size_bytes = sizes.get(part.number, size_bytes)
            for position, value_index in self._spans.get(part.number, ())[part.start : part.stop]:
                choice[position] = value_index
        return _Recipe(choice, size_bytes)

    # What is uncertain

    def _collect_sectors(self) -> None:
        """Find the sectors with more than one possible value, and which value each change gave them.

        ``_spans`` maps the number of a change to (position in ``_sectors``, index into ``_values``) pairs.
        """
        self._sectors: list[int] = []
        self._values: list[list[bytes]] = []
        self._value_is_data: list[list[bool]] = []
        self._spans: dict[int, list[tuple[int, int]]] = {}
        for sector, history in sorted(self._moment.histories.items()):
            is_data = {version.value: version.is_data for version in history}
            if len(is_data) == 1:
                continue
            values = list(is_data)
            for version in history[1:]:
                landed = (len(self._sectors), values.index(version.value))
                self._spans.setdefault(version.change, []).append(landed)
            self._sectors.append(sector)
            self._values.append(values)
            self._value_is_data.append(list(is_data.values()))

    def _torn_writes(self) -> Iterator[_Torn]:
        for number in self._numbers:
            length = len(self._spans.get(number, ()))
            if length < 2:
                continue
            for cut in sorted({1, length // 2, length - 1}):
                for head_lands, rest_lands in itertools.product((True, False), repeat=2):
                    yield _Torn(number, cut, head_lands, rest_lands)

    def _find_garbage_blocks(self, garbage_allowed: GarbageRule | None) -> list[int]:
        if garbage_allowed is None:
            return []
        allowed = {
            change.number
            for change in self._moment.changes
            if isinstance(change, Write) and garbage_allowed(change.offset, len(change.data))
        }
        return sorted(
            {
                sector * self._sector_bytes // GARBAGE_BLOCK_BYTES
                for sector, history in self._moment.histories.items()
                if any(version.change in allowed for version in history)
            }
        )

    # From a recipe to a state

    def _state(self, family: _Family, index: int) -> CrashState:
        recipe = family.build(index)
        base, deltas = self._sums_for(recipe.size_bytes)
        total = base
        for delta, value_index in zip(deltas, recipe.choice, strict=True):
            if value_index:
                total += delta[value_index]
        if recipe.garbage:
            total += self._garbage_delta(recipe, family.kind, index)
        return CrashState(
            kind=family.kind,
            index=index,
            seed=self.seed,
            size_bytes=recipe.size_bytes,
            digest=_digest(total, recipe.size_bytes),
            in_flight=bool(self._moment.changes),
            _space=self,
            _choice=tuple(recipe.choice),
            _garbage=recipe.garbage,
        )

    def content_of(self, state: CrashState) -> bytes:
        """Return the bytes of a state of this space."""
        content = bytearray(self._moment.durable)
        width = self._sector_bytes
        for sector, values, value_index in zip(self._sectors, self._values, state._choice, strict=True):
            if value_index:
                content[sector * width : (sector + 1) * width] = values[value_index]
        for block in state._garbage:
            start = block * GARBAGE_BLOCK_BYTES
            stop = min(start + GARBAGE_BLOCK_BYTES, len(content))
            content[start:stop] = self._garbage(state.kind, state.index, block)[: stop - start]
        return bytes(content[: state.size_bytes])

    def data_sectors_of(self, state: CrashState) -> set[int]:
        """Return the indices of the sectors that hold data in a state of this space."""
        found = set(self._moment.data_sectors)
        for sector, is_data, value_index in zip(
            self._sectors, self._value_is_data, state._choice, strict=True
        ):
            if is_data[value_index]:
                found.add(sector)
            else:
                found.discard(sector)
        for block in state._garbage:
            found.update(self._sectors_of_block(block))
        end = -(-state.size_bytes // self._sector_bytes)
        return {sector for sector in found if sector < end}

    # Digests, sector by sector

    @functools.cached_property
    def _running_totals(self) -> list[int]:
        """Sums of the tokens of the durable content: entry n covers the sectors before n."""
        width, durable = self._sector_bytes, self._moment.durable
        tokens = (
            _sector_token(start // width, durable[start : start + width])
            for start in range(0, len(durable), width)
        )
        return list(itertools.accumulate(tokens, initial=0))

    @functools.cached_property
    def _value_tokens(self) -> list[list[int]]:
        return [
            [_sector_token(sector, value) for value in values]
            for sector, values in zip(self._sectors, self._values, strict=True)
        ]

    def _sums_for(self, size_bytes: int) -> tuple[int, list[list[int]]]:
        """Return the token sum of the durable content cut to a size, and what each value adds to it."""
        if size_bytes not in self._sums:
            whole, rest = divmod(size_bytes, self._sector_bytes)
            base = self._running_totals[whole]
            if rest:
                base += self._token_within(whole, self._durable_sector(whole), size_bytes)
            deltas = [self._deltas_within(position, size_bytes) for position in range(len(self._sectors))]
            self._sums[size_bytes] = (base, deltas)
        return self._sums[size_bytes]

    def _deltas_within(self, position: int, size_bytes: int) -> list[int]:
        sector = self._sectors[position]
        tokens: Sequence[int] = self._value_tokens[position]
        if (sector + 1) * self._sector_bytes > size_bytes:
            tokens = [self._token_within(sector, value, size_bytes) for value in self._values[position]]
        return [token - tokens[0] for token in tokens]

    def _token_within(self, sector: int, value: bytes, size_bytes: int) -> int:
        """Return the token of a sector of a file of that size: bytes past the end count as zeros."""
        kept = min(max(0, size_bytes - sector * self._sector_bytes), self._sector_bytes)
        return _sector_token(sector, value[:kept].ljust(self._sector_bytes, b"\0"))

    def _garbage_delta(self, recipe: _Recipe, kind: str, index: int) -> int:
        positions = {sector: position for position, sector in enumerate(self._sectors)}
        delta = 0
        for block in recipe.garbage:
            garbage = self._garbage(kind, index, block)
            for number, sector in enumerate(self._sectors_of_block(block)):
                start = number * self._sector_bytes
                value = self._durable_sector(sector)
                if sector in positions:
                    value = self._values[positions[sector]][recipe.choice[positions[sector]]]
                delta += self._token_within(
                    sector, garbage[start : start + self._sector_bytes], recipe.size_bytes
                )
                delta -= self._token_within(sector, value, recipe.size_bytes)
        return delta

    def _garbage(self, kind: str, index: int, block: int) -> bytes:
        return Random(f"{self.seed}/garbage/{kind}/{index}/{block}").randbytes(GARBAGE_BLOCK_BYTES)

    def _sectors_of_block(self, block: int) -> range:
        per_block = GARBAGE_BLOCK_BYTES // self._sector_bytes
        return range(block * per_block, (block + 1) * per_block)

    def _durable_sector(self, sector: int) -> bytes:
        start = sector * self._sector_bytes
        return self._moment.durable[start : start + self._sector_bytes]


def enumerate_states(
    device: SimulatedDevice, *, budget: int, seed: int = 0, garbage_allowed: GarbageRule | None = None
) -> Iterator[CrashState]:
    """Yield at most ``budget`` distinct states that a crash of ``device`` may leave now.

    All of them, if they are few. Otherwise, in turn: nothing landed; all landed; prefixes; single changes;
    all but one; writes torn at the first, the middle and the last sector; suffixes; each size; each garbage
    block; random subsets with random tears; random sectors. The same arguments give the same states.
    """
    return crash_space(device, seed=seed, garbage_allowed=garbage_allowed).states(budget)


class PairSpace:
    """All crash states of two devices at one moment: any state of the one with any of the other."""

    def __init__(self, first: CrashSpace, second: CrashSpace) -> None:
        """Take the spaces of a device and of its companion, of one seed."""
        self.seed = first.seed
        self._first = first
        self._second = second

    @property
    def state_count(self) -> int:
        """How many states there are without garbage, as `CrashSpace.state_count`."""
        return self._first.state_count * self._second.state_count

    def state(self, spec: str) -> CrashState:
        """Return the state that ``spec`` names; a spec of one device is meant for both."""
        first, _, second = spec.partition("+")
        return _joined(self._first.state(first), self._second.state(second or first))

    def states(self, budget: int) -> Iterator[CrashState]:
        """Yield at most ``budget`` states, no two alike: all of them if they are few, else a mixture."""
        seen: set[bytes] = set()
        for first, second in self._pairs(budget):
            state = _joined(first, second)
            if len(seen) >= budget:
                return
            if state.digest not in seen:
                seen.add(state.digest)
                yield state

    def _pairs(self, budget: int) -> Iterator[tuple[CrashState, CrashState]]:
        firsts, seconds = list(self._first.states(budget)), list(self._second.states(budget))
        if len(firsts) * len(seconds) <= budget:
            yield from itertools.product(firsts, seconds)
            return
        random = Random(f"{self.seed}/pairs")
        ends = [
            (space.state(f"none:0:{self.seed}"), space.state(f"all:0:{self.seed}")) for space in self._spaces
        ]
        (first_none, first_all), (second_none, second_all) = ends
        yield from ((first_none, second_none), (first_all, second_all))
        # What one of them keeps and the other loses comes first: that is what their order is about.
        yield from ((first_all, second_none), (first_none, second_all))
        for first, second in itertools.zip_longest(firsts, seconds):
            if first is not None:
                yield from ((first, second_none), (first, second_all))
                yield first, random.choice(seconds)
            if second is not None:
                yield from ((first_none, second), (first_all, second))
                yield random.choice(firsts), second

    @property
    def _spaces(self) -> tuple[CrashSpace, CrashSpace]:
        return self._first, self._second


def _joined(first: CrashState, second: CrashState) -> CrashState:
    digest = blake2b(first.digest + second.digest, digest_size=DIGEST_BYTES).digest()
    in_flight = first.in_flight or second.in_flight
    return replace(first, digest=digest, in_flight=in_flight, beside=second)


def crash_space(
    device: SimulatedDevice, *, seed: int = 0, garbage_allowed: GarbageRule | None = None
) -> CrashSpace | PairSpace:
    """Return all crash states of a device now, with its companion if it has one, which knows no garbage."""
    space = CrashSpace(device.in_flight(), seed=seed, garbage_allowed=garbage_allowed)
    if device.companion is None:
        return space
    return PairSpace(space, CrashSpace(device.companion.in_flight(), seed=seed))
