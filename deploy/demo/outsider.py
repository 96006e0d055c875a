"""Prints rounds as they close, with only nats-py and msgpack. Usage: outsider.py [URL]"""

import asyncio
import sys

import msgpack
import nats


async def main(url: str) -> None:
    events = await (await nats.connect(url)).subscribe("seedwire.v1.events.*")
    print("watching", flush=True)
    async for message in events.messages:
        event = msgpack.unpackb(message.data)
        if event["type"] == "RoundClosed":
            print(event["job"], event["round"], event["reason"], event["loss"], flush=True)
        if event["type"] == "JobEnded":
            break


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "nats://127.0.0.1:4222"))
