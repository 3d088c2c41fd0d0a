package peer_test

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/peer/peertest"
	"github.com/atoll-run/atoll/sandbox"
)

var ctx = context.Background()

// hello answers with the name of the peer that asks.
var hello = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	peer.Answer(w, peer.From(r.Context()).Name)
})

func wantKind(t *testing.T, err error, kind sandbox.Kind) {
	t.Helper()
	if !sandbox.Is(err, kind) {
		t.Errorf("%v, want %s", err, kind)
	}
}

func ask(t *testing.T, l *peer.Link) string {
	t.Helper()
	var name string
	if err := l.Call(ctx, http.MethodGet, "/who", nil, &name); err != nil {
		t.Error(err)
	}
	return name
}

// conformance: S1
func TestJoinedNodesKnowEachOtherBothWays(t *testing.T) {
	a, b := peertest.Listen(t, "a", hello, nil), peertest.Listen(t, "b", hello, nil)
	peertest.Join(t, a, b, b.Addr)
	for _, pair := range [][2]*peertest.Node{{a, b}, {b, a}} {
		from, to := pair[0], pair[1]
		list := from.List()
		if len(list) != 1 || list[0].ID != to.ID() || list[0].Addr != to.Addr {
			t.Fatalf("%+v", list)
		}
		p, err := from.Find(to.ID()[:6])
		if err != nil {
			t.Fatal(err)
		}
		l, err := from.Link(ctx, p)
		if err != nil {
			t.Fatal(err)
		}
		if l.Flows() < 2 {
			t.Errorf("%d flows", l.Flows())
		}
		if me := ask(t, l); me != map[*peertest.Node]string{a: "a", b: "b"}[from] {
			t.Errorf("the other end takes me for %q", me)
		}
		if d, err := from.Ping(ctx, p); err != nil || d <= 0 {
			t.Errorf("%v, %v", d, err)
		}
	}
}

// A name leads to one node: it is refused at either end when it is another's already, and free again when that is forgotten.
func TestANameIsOfOneNode(t *testing.T) {
	a, b, twin := peertest.Listen(t, "a", hello, nil), peertest.Listen(t, "b", hello, nil), peertest.Listen(t, "b", hello, nil)
	peertest.Join(t, a, b, b.Addr)
	join := func(from, to *peertest.Node) error {
		token, err := to.Token()
		if err != nil {
			t.Fatal(err)
		}
		_, err = from.Join(ctx, to.Addr, token)
		return err
	}
	for _, pair := range [][2]*peertest.Node{{twin, a}, {a, twin}, {twin, b}} {
		if err := join(pair[0], pair[1]); !sandbox.Is(err, sandbox.Conflict) || sandbox.HintOf(err) == "" {
			t.Errorf("a second node is called b: %v", err)
		}
	}
	if err := join(a, b); err != nil {
		t.Errorf("the same node joins again: %v", err)
	}
	if err := a.Forget("b"); err != nil {
		t.Fatal(err)
	}
	if err := join(a, twin); err != nil {
		t.Error(err)
	}
}

// conformance: S1
func TestATokenIsGoodOnceAndForItsNodeOnly(t *testing.T) {
	a, b, c := peertest.Listen(t, "a", hello, nil), peertest.Listen(t, "b", hello, nil), peertest.Listen(t, "c", hello, nil)
	token, err := b.Token()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Join(ctx, c.Addr, token); !sandbox.Is(err, sandbox.Denied) {
		t.Errorf("another node than the token's is joined: %v", err)
	}
	if _, err := a.Join(ctx, b.Addr, token); err != nil {
		t.Fatal(err)
	}
	_, err = c.Join(ctx, b.Addr, token)
	wantKind(t, err, sandbox.Denied)
	raw, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(token, "atoll1-"))
	if err != nil {
		t.Fatal(err)
	}
	raw[0] ^= 1
	_, err = c.Join(ctx, b.Addr, "atoll1-"+base64.RawURLEncoding.EncodeToString(raw))
	wantKind(t, err, sandbox.Denied)
	for _, bad := range []string{"", "atoll1-", "atoll1-AAAA", "atoll2-" + token[7:], token + "A"} {
		_, err := c.Join(ctx, b.Addr, bad)
		wantKind(t, err, sandbox.Invalid)
	}
	own, err := b.Token()
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.Join(ctx, b.Addr, own)
	wantKind(t, err, sandbox.Invalid)
	if len(b.List()) != 1 || len(c.List()) != 0 {
		t.Errorf("%d and %d peers", len(b.List()), len(c.List()))
	}
}

// conformance: S1
func TestATokenEnds(t *testing.T) {
	now := time.Now()
	b, err := peer.Open(peer.Config{Dir: t.TempDir(), Name: "b", Cert: peertest.Cert(t, "b"), Log: slog.New(slog.DiscardHandler), Handler: hello,
		Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer b.Split(ln, nil).Close()
	token, err := b.Token()
	if err != nil {
		t.Fatal(err)
	}
	now = now.Add(peer.TokenLife + time.Second)
	_, err = peertest.Listen(t, "a", hello, nil).Join(ctx, ln.Addr().String(), token)
	wantKind(t, err, sandbox.Denied)
	for range 64 {
		if _, err := b.Token(); err != nil {
			t.Fatal(err)
		}
	}
	_, err = b.Token()
	wantKind(t, err, sandbox.Exhausted)
}

// conformance: S1
func TestOneSidedTrustIsNone(t *testing.T) {
	a, b := peertest.Listen(t, "a", hello, nil), peertest.Listen(t, "b", hello, nil)
	peertest.Join(t, a, b, b.Addr)
	p, err := a.Find("b")
	if err != nil {
		t.Fatal(err)
	}
	l, err := a.Link(ctx, p)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Forget("a"); err != nil {
		t.Fatal(err)
	}
	wantKind(t, l.Call(ctx, http.MethodGet, "/who", nil, nil), sandbox.Denied)
	_, err = a.Ping(ctx, p)
	wantKind(t, err, sandbox.Denied)
	_, err = b.Find("a")
	wantKind(t, err, sandbox.NotFound)
	wantKind(t, b.Forget("a"), sandbox.NotFound)
}

func TestClocksNeedNotAgree(t *testing.T) {
	for _, skew := range []time.Duration{-5 * 365 * 24 * time.Hour, 5 * 365 * 24 * time.Hour} {
		a, err := peer.Open(peer.Config{Dir: t.TempDir(), Name: "a", Cert: peertest.Cert(t, "a"), Log: slog.New(slog.DiscardHandler), Handler: hello,
			Now: func() time.Time { return time.Now().Add(skew) }})
		if err != nil {
			t.Fatal(err)
		}
		b := peertest.Listen(t, "b", hello, nil)
		token, err := b.Token()
		if err != nil {
			t.Fatal(err)
		}
		p, err := a.Join(ctx, b.Addr, token)
		if err != nil {
			t.Fatalf("%v apart: %v", skew, err)
		}
		if _, err := a.Ping(ctx, p); err != nil {
			t.Errorf("%v apart: %v", skew, err)
		}
		_ = a.Close()
	}
}

func TestAConnectionThatIsTurnedRoundIsAskedTheOtherWay(t *testing.T) {
	a, b := peertest.Listen(t, "a", hello, nil), peertest.Listen(t, "b", hello, nil)
	peertest.Join(t, a, b, b.Addr)
	atA, _ := a.Find("b")
	atB, _ := b.Find("a")
	end, err := a.Turn(ctx, atA)
	if err != nil {
		t.Fatal(err)
	}
	l, err := b.Turned(ctx, atB)
	if err != nil {
		t.Fatal(err)
	}
	if me := ask(t, l); me != "b" {
		t.Errorf("a takes b for %q", me)
	}
	end()
	for limit := time.Now().Add(20 * time.Second); l.Flows() > 0 && time.Now().Before(limit); {
		time.Sleep(time.Millisecond) // the end travels as bytes do
	}
	wantKind(t, l.Call(ctx, http.MethodGet, "/who", nil, nil), sandbox.Unavailable)
	short, stop := context.WithTimeout(ctx, 50*time.Millisecond)
	defer stop()
	_, err = b.Turned(short, atB)
	wantKind(t, err, sandbox.Unavailable)
	// A stranger cannot turn anything round.
	c := peertest.Listen(t, "c", hello, nil)
	if end, err := c.Turn(ctx, atA); err == nil {
		end()
	}
	if l, err := b.Turned(short, peer.Peer{ID: c.ID()}); err == nil {
		t.Errorf("a stranger's connection is used: %v", l.Peer)
	}
}

func TestWhatIsNoPeerPassesThrough(t *testing.T) {
	cert := peertest.Cert(t, "public")
	for name, public := range map[string]*tls.Config{"plain": nil, "tls": {Certificates: []tls.Certificate{cert}}} {
		n := peertest.Listen(t, "n", hello, public)
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, "public ", r.TLS != nil)
		})}
		go func() { _ = srv.Serve(n.Others) }()
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}}
		get := func(scheme string) string {
			resp, err := client.Get(scheme + "://" + n.Addr)
			if err != nil {
				return "failed"
			}
			defer resp.Body.Close()
			b, _ := io.ReadAll(resp.Body)
			return string(b)
		}
		plain, secure := get("http"), get("https")
		if public == nil && (plain != "public false" || secure != "failed") {
			t.Errorf("%s: %q and %q", name, plain, secure)
		}
		if public != nil && (strings.HasPrefix(plain, "public") || secure != "public true") {
			t.Errorf("%s: %q and %q", name, plain, secure)
		}
		_ = srv.Close()
	}
}

func TestPeersSurviveAndDamagedOnesAreLeftOut(t *testing.T) {
	dir, cert := t.TempDir(), peertest.Cert(t, "a")
	cfg := peer.Config{Dir: dir, Name: "a", Cert: cert, Log: slog.New(slog.DiscardHandler), Handler: hello}
	a, err := peer.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b := peertest.Listen(t, "b", hello, nil)
	token, _ := b.Token()
	if _, err := a.Join(ctx, b.Addr, token); err != nil {
		t.Fatal(err)
	}
	again, err := peer.Open(cfg)
	if err != nil || len(again.List()) != 1 || again.ID() != a.ID() {
		t.Fatalf("%v, %v", again.List(), err)
	}
	if _, err := again.Ping(ctx, again.List()[0]); err != nil {
		t.Error(err)
	}
}

// conformance: W7
func TestFlowsAreChosenByWhatTheKernelHas(t *testing.T) {
	for available, want := range map[string]peer.Tuning{
		"reno cubic bbr": {Congestion: "bbr", Flows: 3}, "bbr": {Congestion: "bbr", Flows: 3},
		"reno cubic": {Flows: 8}, "": {Flows: 8}, "bbr2x": {Flows: 8},
	} {
		if got := peer.Tune(available); got != want {
			t.Errorf("%q: %+v, want %+v", available, got, want)
		}
	}
}

func FuzzToken(f *testing.F) {
	n := peertest.Listen(f, "n", hello, nil)
	token, err := n.Token()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(token)
	f.Add("atoll1-")
	closed, stop := context.WithCancel(ctx)
	stop()
	f.Fuzz(func(t *testing.T, token string) {
		if _, err := n.Join(closed, "127.0.0.1:1", token); err == nil {
			t.Error("joined")
		}
	})
}
