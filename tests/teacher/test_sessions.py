from megatron_mlr1.teacher.sessions import Session
from megatron_mlr1.teacher.wire import Kind, Message


class Line:
    """A connection that takes messages while it has room."""

    def __init__(self, room=100):
        self.room, self.sent = room, []

    def __call__(self, route, message, session_key):
        if not self.room:
            return False
        self.room -= 1
        self.sent.append((route, message.kind, session_key))
        return True


def data(num_bytes, number=1):
    return Message(kind=Kind.DATA, request=number, frames=(bytes(num_bytes),))


def test_nothing_goes_out_that_the_credit_does_not_cover():
    session, line = Session(b"r", "name", credit=250, promised=300), Line()
    for _ in range(3):
        session.post(data(100))
    assert session.flush(line, line) == 200
    assert (session.sent, session.promised, session.num_waiting) == (200, 100, 1)
    session.credit = 299
    assert session.flush(line, line) == 0
    session.credit = 300
    assert session.flush(line, line) == 100
    assert session.is_idle


def test_signs_of_life_do_not_wait_for_credit():
    session, line = Session(b"r", "name"), Line()
    session.post(data(100))
    session.post(Message(kind=Kind.PONG))
    session.flush(line, line)
    assert [kind for _, kind, _ in line.sent] == [Kind.PONG]


def test_what_the_line_does_not_take_is_sent_later_in_order():
    session, line = Session(b"r", "name", credit=1000), Line(room=1)
    session.post(data(10))
    session.post(data(20))
    assert session.flush(line, line) == 10
    line.room = 5
    assert session.flush(line, line) == 20
    assert session.is_idle


def test_targets_go_over_the_data_port_once_the_student_is_there():
    session, main, open_port = Session(b"main", "name", credit=1000), Line(), Line()
    session.post(data(10))
    session.flush(main, open_port)
    session.data_route = b"open"
    session.post(data(10))
    session.post(Message(kind=Kind.PONG))
    session.flush(main, open_port)
    assert main.sent == [(b"main", Kind.DATA, None), (b"main", Kind.PONG, None)]
    assert open_port.sent == [(b"open", Kind.DATA, session.key)]


def test_every_session_has_secrets_of_its_own():
    one, other = Session(b"r", "name"), Session(b"r", "name")
    assert (len(one.token), len(one.key)) == (16, 32)
    assert one.token != other.token
    assert one.key != other.key
    assert one.key.hex() not in repr(one)
