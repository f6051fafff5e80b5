"""The lab's door: takes connections on a socket that was opened outside its network namespace, and passes them on to
the API server inside. A socket belongs to the namespace in which it was made, whoever accepts from it."""

import asyncio
import socket
import sys
from contextlib import suppress

from tests.cluster.lab.components import ADDRESS, API_PORT

CHUNK = 256 * 1024


async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(CHUNK):
            sink.write(data)
            await sink.drain()
    except ConnectionError:
        sink.transport.abort()  # what one end broke off, the other end sees broken off
    else:
        with suppress(OSError):
            sink.write_eof()


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        inner_reader, inner_writer = await asyncio.open_connection(ADDRESS, API_PORT)
    except OSError:
        writer.transport.abort()
        return
    await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))
    inner_writer.close()
    writer.close()


async def main(descriptor: int) -> None:
    server = await asyncio.start_server(pass_on, sock=socket.socket(fileno=descriptor))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
