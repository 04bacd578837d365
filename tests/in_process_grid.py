"""A Flower grid in this process: each message is handled by the client app as soon as it is sent."""

from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class InProcessGrid(Grid):
    """Nodes 100, 101, ... with the given node configs; `spoil` may give another reply, an Error, or None (silence)."""

    def __init__(self, app, node_configs, spoil=lambda node_id, message, reply: reply):
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self.app, self.spoil, self.sent = app, spoil, []
        self.contexts = {
            100 + n: Context(run_id=1, node_id=100 + n, node_config=config, state=RecordDict(), run_config={})
            for n, config in enumerate(node_configs)
        }
        self.replies = {}

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            node_id = message.metadata.dst_node_id
            self.sent.append(message)
            reply = self.spoil(node_id, message, self.app(message, self.contexts[node_id]))
            if isinstance(reply, Error):
                reply = Message(reply, reply_to=message)
            if reply is not None:
                self.replies[message.metadata.message_id] = reply
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids):
        return [self.replies.pop(own) for own in message_ids if own in self.replies]

    def get_node_ids(self):
        return list(self.contexts)

    def set_run(self, run):
        raise NotImplementedError

    run = property()

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError
