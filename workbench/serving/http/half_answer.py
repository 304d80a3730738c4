"""The answer of an instance that prefills alone: that its half of a request has ended, and how."""

from __future__ import annotations

from workbench.serving.http.openai_api import Shape, encode_json


class HandoverShape(Shape):
    """``{"object": "handover", "status": "handed_over"}``, or how the first sequence ended that ended otherwise."""

    async def whole(self) -> bytes:
        status = "handed_over"
        async for _, chunk in self.events():
            if chunk.kind and status == "handed_over":
                status = f"{chunk.kind}:{chunk.detail}" if chunk.detail else chunk.kind
        return encode_json({"object": "handover", "id": self.request.id, "status": status})
