package runtimetest

import (
	"bytes"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

var dialTests = []test{
	{"a port where nothing listens is unavailable", nil, testDialClosedPort},
	{"a server inside is reached on its port", nil, testDialServer},
	{"many connections at once", nil, testDialMany},
	{"big files pass unharmed", nil, testBigFile},
	{"a flood that nobody reads stays in the guest", nil, testFlood},
}

func testDialClosedPort(t *testing.T, s *suite) {
	b := s.create(t)
	_, err := s.Runtime.Dial(deadline(t), b.id, 1) // tcpmux: nobody has it
	wantKind(t, "Dial", err, sandbox.Unavailable)
	for _, port := range []int{0, -1, 65536} {
		_, err = s.Runtime.Dial(deadline(t), b.id, port)
		wantKind(t, "Dial", err, sandbox.Invalid)
	}
	b.must("true")
}

// echoServer is a TCP echo server for one connection in the languages that a
// root may have. It announces itself in the file "listening".
const echoServer = `
if command -v perl >/dev/null; then
	exec perl -MIO::Socket::INET -e '
		$s = IO::Socket::INET->new(Listen => 5, LocalAddr => "127.0.0.1", LocalPort => $ARGV[0], ReuseAddr => 1) or die;
		open(F, ">listening"); close(F);
		$c = $s->accept; while (sysread($c, $b, 65536)) { syswrite($c, $b) }' $0
elif command -v python3 >/dev/null; then
	exec python3 -c '
import socket, sys
s = socket.create_server(("127.0.0.1", int(sys.argv[1])))
open("listening", "w").close()
c, _ = s.accept()
while b := c.recv(65536): c.sendall(b)' $0
fi
echo none > listening`

func testDialServer(t *testing.T, s *suite) {
	b := s.create(t)
	const port = "38417"
	b.write("server.sh", []byte(echoServer))
	b.must(`setsid sh -c "$(cat server.sh)" ` + port + ` >/dev/null 2>&1 </dev/null &`)
	b.must("while [ ! -e listening ]; do sleep 0.05; done")
	if b.must("cat listening") != "" {
		t.Skip("the root has neither perl nor python3 to make a server with")
	}
	conn, err := s.Runtime.Dial(deadline(t), b.id, 38417)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	sent := randomBytes(1 << 20)
	go func() { _, _ = conn.Write(sent) }()
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(conn, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, sent) {
		t.Error("the bytes came back changed")
	}
}

func testDialMany(t *testing.T, s *suite) {
	b := s.create(t)
	for range 64 {
		conn, err := s.Runtime.Dial(deadline(t), b.id, sandbox.GuestPort)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	b.must("true")
}

func testBigFile(t *testing.T, s *suite) {
	b := s.create(t)
	sent := randomBytes(16 << 20)
	b.write("big", sent)
	if !bytes.Equal(b.read("big"), sent) {
		t.Error("a file of 16 MiB came back changed")
	}
}

// testFlood starts a command that prints without end and does not read what it
// prints: the command must be held up, not the host's memory filled.
func testFlood(t *testing.T, s *suite) {
	const limit = 64 << 20 // bytes; the flood brings this in well under a second
	b := s.create(t)
	b.must("true") // what the first call costs once is not counted
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)

	stop := b.stalled("while :; do cat /dev/zero; done")
	time.Sleep(2 * time.Second)
	runtime.ReadMemStats(&after)
	stop()
	if grown := int64(after.HeapInuse) - int64(before.HeapInuse); grown > limit {
		t.Errorf("2 s of unread output grew the host's heap by %d MiB", grown>>20)
	}
	b.must("true")
}

// randomBytes returns n bytes that do not compress and are the same every time.
func randomBytes(n int) []byte {
	rng := rand.New(rand.NewPCG(1, uint64(n)))
	b := make([]byte, n)
	for i := 0; i+8 <= n; i += 8 {
		v := rng.Uint64()
		for j := range 8 {
			b[i+j] = byte(v >> (8 * j))
		}
	}
	return b
}
