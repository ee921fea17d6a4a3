"""The negotiation: a client chooses an export, and how requests and replies are to look."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jqcow.errors import JqcowError
from jqcow.nbd import contexts, protocol
from jqcow.nbd.contexts import Context
from jqcow.nbd.export import BLOCK_BYTES_PREFERRED, Export
from jqcow.nbd.protocol import (
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    Form,
    HangUp,
    Info,
    Malformed,
    Option,
    Reply,
)
from jqcow.nbd.stream import Stream

CONTEXTS_MAX = 64
"""Of metadata contexts that one connection has: each costs a chunk in every reply."""


@dataclass(frozen=True)
class Agreed:
    """What a negotiation led to."""

    export: Export
    form: Form
    contexts: tuple[Context, ...]


class _Chosen(Exception):
    """The negotiation is over."""

    def __init__(self, export: Export) -> None:
        super().__init__()
        self.export = export


class Negotiation:
    """One negotiation. ``exports`` by their names; the one named "" is the default."""

    def __init__(
        self, stream: Stream, exports: Mapping[str, Export], tls: ssl.SSLContext | None = None
    ) -> None:
        """With ``tls`` nothing is told in the clear."""
        self._stream = stream
        self._exports = exports
        self._tls = tls
        self._is_secure = tls is None
        self._no_zeroes = False
        self._structured = False
        self._extended = False
        self._contexts: tuple[Context, ...] = ()
        self._contexts_of: Export | None = None
        self._answers: dict[int, Callable[[bytes], None]] = {
            Option.EXPORT_NAME: self._export_name,
            Option.ABORT: self._abort,
            Option.LIST: self._list,
            Option.STARTTLS: self._start_tls,
            Option.INFO: self._info,
            Option.GO: self._go,
            Option.STRUCTURED_REPLY: self._structured_reply,
            Option.LIST_META_CONTEXT: self._list_contexts,
            Option.SET_META_CONTEXT: self._set_contexts,
            Option.EXTENDED_HEADERS: self._extended_headers,
        }
        self._option = 0

    def run(self) -> Agreed:
        """Negotiate.

        Raises:
            HangUp: the client does not want anything, breaks the protocol, or is gone.
        """
        greeting = protocol.GREETING.pack(
            protocol.NBD_MAGIC, protocol.OPTION_MAGIC, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES
        )
        self._send(greeting)
        (flags,) = protocol.CLIENT_FLAGS.unpack(self._stream.receive(protocol.CLIENT_FLAGS.size))
        if flags & ~(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES):
            raise HangUp(f"the client has unknown flags {flags:#x}")
        self._no_zeroes = bool(flags & FLAG_NO_ZEROES)
        try:
            for _ in range(protocol.OPTIONS_MAX):
                self._next_option()
        except _Chosen as chosen:
            form = Form(self._structured, self._extended)
            found = self._contexts if self._contexts_of is chosen.export else ()
            return Agreed(chosen.export, form, found)
        raise HangUp("the client negotiates without an end")

    def _next_option(self) -> None:
        header = self._stream.receive(protocol.OPTION_HEADER.size)
        magic, self._option, length = protocol.OPTION_HEADER.unpack(header)
        if magic != protocol.OPTION_MAGIC:
            raise HangUp("an option does not begin as one")
        if length > protocol.OPTION_BYTES_MAX:
            if length > protocol.OPTION_BYTES_SKIPPED_MAX or self._option == Option.EXPORT_NAME:
                raise HangUp(f"an option has {length} bytes")
            self._stream.skip(length)
            self._refuse(Reply.ERR_TOO_BIG, f"an option of {length} bytes is too long")
            return
        data = self._stream.receive(length)
        if not self._is_secure and self._option not in (Option.STARTTLS, Option.ABORT):
            if self._option == Option.EXPORT_NAME:
                raise HangUp("the client does not use TLS")
            self._refuse(Reply.ERR_TLS_REQD, "this server needs TLS")
            return
        answer = self._answers.get(self._option)
        if answer is None:
            self._refuse(Reply.ERR_UNSUP, f"option {self._option} is not known")
            return
        try:
            answer(data)
        except Malformed as error:
            if self._option == Option.EXPORT_NAME:
                raise HangUp(str(error)) from error
            self._refuse(Reply.ERR_INVALID, str(error))
        except (JqcowError, OSError) as error:
            # What the image would have to tell could not be read.
            self._refuse(Reply.ERR_INVALID, str(error))

    def _send(self, *parts: bytes) -> None:
        self._stream.send(parts, lambda: False)

    def _reply(self, reply: Reply, data: bytes = b"") -> None:
        self._send(protocol.option_reply(self._option, reply, data))

    def _refuse(self, reply: Reply, text: str) -> None:
        self._reply(reply, text.encode("utf-8", "replace")[: protocol.NAME_BYTES_MAX])

    def _require_empty(self, data: bytes) -> None:
        if data:
            raise Malformed("the option has no data")

    # Options

    def _export_name(self, data: bytes) -> None:
        export = self._exports.get(protocol.parse_name(data))
        if export is None:
            # There is no reply that says so.
            raise HangUp("the client wants an export that there is not")
        head = protocol.EXPORT_REPLY.pack(export.image.size, export.flags(structured=self._structured))
        self._send(head, b"" if self._no_zeroes else protocol.ZEROES_AFTER_EXPORT)
        raise _Chosen(export)

    def _abort(self, _: bytes) -> None:
        self._reply(Reply.ACK)
        raise HangUp("the client wants nothing more")

    def _list(self, data: bytes) -> None:
        self._require_empty(data)
        for name, export in self._exports.items():
            self._reply(Reply.SERVER, protocol.counted(name.encode()) + export.description.encode())
        self._reply(Reply.ACK)

    def _start_tls(self, data: bytes) -> None:
        self._require_empty(data)
        if self._tls is None:
            self._refuse(Reply.ERR_POLICY, "this server has no TLS")
        elif self._is_secure:
            self._refuse(Reply.ERR_INVALID, "the connection is by TLS")
        else:
            self._reply(Reply.ACK)
            self._stream.secure(self._tls)
            self._is_secure = True

    def _info(self, data: bytes) -> None:
        self._tell(data)

    def _go(self, data: bytes) -> None:
        export = self._tell(data)
        if export is not None:
            raise _Chosen(export)

    def _tell(self, data: bytes) -> Export | None:
        asked = protocol.parse_asked(data)
        export = self._exports.get(asked.name)
        if export is None:
            self._refuse(Reply.ERR_UNKNOWN, "there is no such export")
            return None
        flags = export.flags(structured=self._structured)
        self._reply(Reply.INFO, protocol.INFO_EXPORT.pack(Info.EXPORT, export.image.size, flags))
        if Info.NAME in asked.kinds:
            self._reply(Reply.INFO, protocol.HALF.pack(Info.NAME) + export.name.encode())
        if Info.DESCRIPTION in asked.kinds and export.description:
            self._reply(Reply.INFO, protocol.HALF.pack(Info.DESCRIPTION) + export.description.encode())
        sizes = protocol.INFO_BLOCK_SIZE.pack(
            Info.BLOCK_SIZE, 1, BLOCK_BYTES_PREFERRED, protocol.PAYLOAD_BYTES_MAX
        )
        self._reply(Reply.INFO, sizes)
        self._reply(Reply.ACK)
        return export

    def _structured_reply(self, data: bytes) -> None:
        self._require_empty(data)
        if self._extended:
            self._refuse(Reply.ERR_EXT_HEADER_REQD, "extended headers have structured replies")
            return
        self._structured = True
        self._reply(Reply.ACK)

    def _extended_headers(self, data: bytes) -> None:
        self._require_empty(data)
        if self._extended:
            self._refuse(Reply.ERR_INVALID, "headers are extended")
            return
        self._structured = self._extended = True
        # They are chosen anew: replies look different now.
        self._contexts, self._contexts_of = (), None
        self._reply(Reply.ACK)

    def _list_contexts(self, data: bytes) -> None:
        asked = protocol.parse_queries(data)
        export = self._export_for_contexts(asked.name)
        if export is None:
            return
        found: dict[str, None] = {} if asked.queries else dict.fromkeys(contexts.names_of(export.image))
        for query in asked.queries:
            found |= dict.fromkeys(contexts.matching(export.image, query, listing=True))
        for name in found:
            self._reply(Reply.META_CONTEXT, protocol.WORD.pack(0) + name.encode("utf-8", "replace"))
        self._reply(Reply.ACK)

    def _set_contexts(self, data: bytes) -> None:
        self._contexts, self._contexts_of = (), None
        asked = protocol.parse_queries(data)
        export = self._export_for_contexts(asked.name)
        if export is None:
            return
        names: dict[str, None] = {}
        for query in asked.queries:
            names |= dict.fromkeys(contexts.matching(export.image, query, listing=False))
        if len(names) > CONTEXTS_MAX:
            raise Malformed(f"{len(names)} metadata contexts are more than {CONTEXTS_MAX}")
        found = tuple(contexts.context_of(export.image, name, number) for number, name in enumerate(names))
        for context in found:
            name = context.name.encode("utf-8", "replace")
            self._reply(Reply.META_CONTEXT, protocol.WORD.pack(context.number) + name)
        self._contexts, self._contexts_of = found, export
        self._reply(Reply.ACK)

    def _export_for_contexts(self, name: str) -> Export | None:
        if not self._structured:
            raise Malformed("metadata contexts need structured replies")
        export = self._exports.get(name)
        if export is None:
            self._refuse(Reply.ERR_UNKNOWN, "there is no such export")
        return export
