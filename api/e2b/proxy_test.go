package e2b

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// serve lets a handler answer on a port inside a sandbox.
func (s *server) serve(id string, port int, h http.Handler) {
	s.t.Helper()
	inside := httptest.NewServer(h)
	s.t.Cleanup(inside.Close)
	s.carry(id, port, inside.Listener.Addr().String())
}

// carry connects a port inside a sandbox with an address of the test.
func (s *server) carry(id string, port int, to string) {
	s.world.Serve(id, port, func(c net.Conn) {
		defer c.Close()
		up, err := net.Dial("tcp", to)
		if err != nil {
			return
		}
		defer up.Close()
		go func() {
			_, _ = io.Copy(up, c)
			_ = up.Close()
		}()
		_, _ = io.Copy(c, up)
	})
}

func hostOf(port int, id string) string { return fmt.Sprintf("%d-%s.sandbox.test", port, id) }

func TestTrafficReachesPortsByHostAndByHeaders(t *testing.T) {
	s := newServer(t)
	sb := s.create("")
	s.serve(sb.SandboxID, 8000, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Seen-Host", r.Host)
		if r.Header.Get(headerSandbox) != "" || r.Header.Get(headerTraffic) != "" {
			t.Error("headers that were meant for the proxy reached the server inside")
		}
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %s", r.Method, r.URL, body)
	}))
	host := hostOf(8000, sb.SandboxID)
	r := s.want(s.send("PUT", "/api/x%2Fy?q=1;2", "body", http.Header{headerTraffic: {"x"}}, host), 200)
	if string(r.body) != "PUT /api/x%2Fy?q=1;2 body" || r.header.Get("X-Seen-Host") != host {
		t.Errorf("%q as host %q", r.body, r.header.Get("X-Seen-Host"))
	}
	r = s.want(s.send("GET", "/", "", http.Header{headerSandbox: {sb.SandboxID}, headerPort: {"8000"}}, ""), 200)
	if string(r.body) != "GET / " {
		t.Errorf("%q", r.body)
	}
	s.want(s.send("GET", "/health", "", http.Header{headerSandbox: {sb.SandboxID}}, ""), 204)
	s.want(s.send("GET", "/metrics", "", http.Header{headerSandbox: {sb.SandboxID}}, ""), 401)
	s.want(s.send("GET", "/metrics", "", http.Header{headerSandbox: {sb.SandboxID}, "X-Access-Token": {sb.EnvdToken}}, ""), 200)
}

const browser = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36"

// refused checks both forms of a refusal.
func (s *server) refused(host string, header http.Header, status int, message, title string, port int) {
	s.t.Helper()
	r := s.send("GET", "/", "", header, host)
	var f refusal
	r.into(s.t, &f)
	id := shortID(strings.SplitN(strings.SplitN(host, ".", 2)[0], "-", 2)[1])
	if r.status != status || f.Code != status || f.Message != message || f.SandboxID != id || f.Port != port {
		s.t.Errorf("%d %s", r.status, r.body)
	}
	if ct := r.header.Get("Content-Type"); ct != "application/json; charset=utf-8" {
		s.t.Errorf("content type %q", ct)
	}
	page := s.send("GET", "/", "", merge(header, http.Header{"User-Agent": {browser}}), host)
	text := string(page.body)
	if page.status != status || !strings.HasPrefix(text, "<html") || !strings.HasSuffix(text, "</html>") || !strings.Contains(text, "<title>"+title+"</title>") || !strings.Contains(text, id) {
		s.t.Errorf("%d %s", page.status, text)
	}
}

func merge(a, b http.Header) http.Header {
	out := b.Clone()
	for k, v := range a {
		out[k] = v
	}
	return out
}

func TestRefusalsSayWhatIsMissing(t *testing.T) {
	s := newServer(t)
	notFound := "The sandbox was not found"
	s.refused("8000-ghost.sandbox.test", nil, 502, notFound, "Sandbox Not Found", 0)
	sb := s.create("")
	s.refused(hostOf(3000, sb.SandboxID), nil, 502, "The sandbox is running but port is not open", "Closed Port Error", 3000)
	s.refused(hostOf(8000, s.name(sb.SandboxID)[:3]), nil, 502, notFound, "Sandbox Not Found", 0)
	s.want(s.do("POST", "/sandboxes/"+sb.SandboxID+"/pause", ""), 204)
	s.refused(hostOf(49983, sb.SandboxID), nil, 502, notFound, "Sandbox Not Found", 0)
	s.want(s.do("DELETE", "/sandboxes/"+sb.SandboxID, ""), 204)
	s.refused(hostOf(8000, sb.SandboxID), nil, 502, notFound, "Sandbox Not Found", 0)
}

func TestPrivateTrafficNeedsItsToken(t *testing.T) {
	s := newServer(t)
	sb := s.create(`"network":{"allowPublicTraffic":false}`)
	if sb.TrafficToken == nil || *sb.TrafficToken == "" {
		t.Fatal("no traffic token")
	}
	host := hostOf(8080, sb.SandboxID)
	s.refused(host, nil, 403, "Sandbox is secured with traffic access token. Token header 'e2b-traffic-access-token' is missing", "Missing Traffic Access Token", 0)
	s.refused(host, http.Header{headerTraffic: {"abcd"}}, 403, "Sandbox is secured with traffic access token. Provided token in header 'e2b-traffic-access-token' is invalid", "Invalid Traffic Access Token", 0)
	s.serve(sb.SandboxID, 8080, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	s.want(s.send("GET", "/", "", http.Header{headerTraffic: {*sb.TrafficToken}}, host), 200)
	s.want(s.send("GET", "/health", "", nil, hostOf(sandbox.GuestPort, sb.SandboxID)), 204) // the agent has a token of its own
	if d := s.detail(sb.SandboxID); *d.Network.AllowPublicTraffic {
		t.Error("the sandbox is shown as public")
	}
}

func TestServersInsideSeeTheMaskedHost(t *testing.T) {
	s := newServer(t)
	sb := s.create(`"network":{"maskRequestHost":"custom.example.com:${PORT}"}`)
	s.serve(sb.SandboxID, 8080, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Host) }))
	if r := s.want(s.send("GET", "/", "", nil, hostOf(8080, sb.SandboxID)), 200); string(r.body) != "custom.example.com:8080" {
		t.Errorf("%q", r.body)
	}
}

func TestTrafficWakesASandboxThatWantsIt(t *testing.T) {
	s := newServer(t)
	sb := s.create(`"autoPause":true,"autoResume":{"enabled":true}`)
	s.want(s.do("POST", "/sandboxes/"+sb.SandboxID+"/pause", ""), 204)
	s.want(s.send("GET", "/health", "", nil, hostOf(sandbox.GuestPort, sb.SandboxID)), 204)
	if d := s.detail(sb.SandboxID); d.State != sandbox.Running || !d.Lifecycle.AutoResume || !lives(d, defaultLife) {
		t.Errorf("%+v", d)
	}
}

// A stranger must not make a sandbox run, and be paid for, by asking in vain.
func TestRefusedRequestsDoNotWakeASandbox(t *testing.T) {
	s := newServer(t)
	sb := s.create(`"secure":true,"autoPause":true,"autoResume":{"enabled":true}`)
	s.want(s.do("POST", "/sandboxes/"+sb.SandboxID+"/pause", ""), 204)
	d := s.detail(sb.SandboxID)
	if d.EnvdToken == "" {
		t.Fatal("the sandbox has no token")
	}
	expired := "&signature_expiration=1000&signature=" + url.QueryEscape(wire.Sign(d.EnvdToken, "/etc/hosts", wire.OpRead, "", 1000))
	to := http.Header{headerSandbox: {sb.SandboxID}}
	for _, path := range []string{"/files?path=/etc/hosts", "/files?path=/etc/hosts" + expired, "/files?path=/etc/hosts&signature=v1_bad", "/metrics", "/envs"} {
		s.want(s.send("GET", path, "", to, ""), 401)
		to.Set("X-Access-Token", "wrong")
	}
	// Without a header only the signature tells the sandbox.
	s.want(s.send("GET", "/files?path=/etc/hosts"+expired, "", nil, ""), 401)
	if d := s.detail(sb.SandboxID); d.State != sandbox.Paused {
		t.Fatalf("it is %s", d.State)
	}
	to.Set("X-Access-Token", d.EnvdToken)
	s.want(s.send("GET", "/metrics", "", to, ""), 200)
	if d := s.detail(sb.SandboxID); d.State != sandbox.Running {
		t.Errorf("with the token it is %s", d.State)
	}
}

func TestASandboxThatTrafficWokeStaysAwakeAWhile(t *testing.T) {
	s := newServer(t)
	sb := s.create(`"autoPause":true,"autoResume":{"policy":"any"}`)
	s.want(s.do("POST", "/sandboxes/"+sb.SandboxID+"/timeout", `{"timeout":0}`), 204)
	if _, err := s.node.Wait(t.Context(), sb.SandboxID, sandbox.Paused); err != nil {
		t.Fatal(err)
	}
	s.want(s.send("GET", "/health", "", nil, hostOf(sandbox.GuestPort, sb.SandboxID)), 204)
	if d := s.detail(sb.SandboxID); d.State != sandbox.Running || d.EndAt.Sub(d.StartedAt) < minWokenLife {
		t.Errorf("%+v", d)
	}
}

func TestStreamsAreNotBufferedAndEndWithTheirClient(t *testing.T) {
	s := newServer(t)
	sb := s.create("")
	gone := make(chan struct{})
	s.serve(sb.SandboxID, 8000, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "first")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done() // only a client that went away ends this
		close(gone)
	}))
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, "GET", s.http.URL, nil)
	must(t, err)
	req.Host = hostOf(8000, sb.SandboxID)
	res, err := http.DefaultTransport.RoundTrip(req)
	must(t, err)
	defer res.Body.Close()
	first := make([]byte, 5)
	if _, err := io.ReadFull(res.Body, first); err != nil || string(first) != "first" {
		t.Fatalf("%q, %v", first, err)
	}
	cancel()
	<-gone
}

func TestConnectionsCanBeUpgraded(t *testing.T) {
	s := newServer(t)
	sb := s.create("")
	s.serve(sb.SandboxID, 8000, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "echo" {
			t.Errorf("upgrade header %q", r.Header.Get("Upgrade"))
		}
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		line, _ := rw.ReadString('\n')
		fmt.Fprint(c, "echo "+line)
	}))
	c, err := net.Dial("tcp", s.http.Listener.Addr().String())
	must(t, err)
	defer c.Close()
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n", hostOf(8000, sb.SandboxID))
	in := bufio.NewReader(c)
	res, err := http.ReadResponse(in, nil)
	must(t, err)
	if res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("status %d", res.StatusCode)
	}
	fmt.Fprint(c, "hello\n")
	if line, err := in.ReadString('\n'); err != nil || line != "echo hello\n" {
		t.Errorf("%q, %v", line, err)
	}
}

func TestServersInsideMaySpeakTLS(t *testing.T) {
	s := newServer(t)
	sb := s.create(`"network":{"httpsPorts":[8443]}`)
	inside := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "secret") }))
	t.Cleanup(inside.Close)
	s.carry(sb.SandboxID, 8443, inside.Listener.Addr().String())
	if r := s.want(s.send("GET", "/", "", nil, hostOf(8443, sb.SandboxID)), 200); string(r.body) != "secret" {
		t.Errorf("%q", r.body)
	}
}

func TestASignedFileURLFindsItsSandboxByItself(t *testing.T) {
	s := newServer(t)
	s.create("")
	sb := s.create("")
	query := func(op string, expires int64) string {
		q := url.Values{"path": {"note.txt"}, "signature": {wire.Sign(sb.EnvdToken, "note.txt", op, "", expires)}}
		if expires != 0 {
			q.Set("signature_expiration", fmt.Sprint(expires))
		}
		return "/files?" + q.Encode()
	}
	later := time.Now().Add(time.Hour).Unix()
	body := http.Header{"Content-Type": {"application/octet-stream"}}
	s.want(s.send("POST", query(wire.OpWrite, later), "hello", body, ""), 200)
	if r := s.want(s.send("GET", query(wire.OpRead, 0), "", nil, ""), 200); string(r.body) != "hello" {
		t.Errorf("%q", r.body)
	}
	r := s.want(s.send("GET", query(wire.OpRead, 1_000_000), "", nil, ""), 401)
	if r.message() != "signature is already expired" {
		t.Errorf("%s", r.body)
	}
	s.want(s.send("GET", query(wire.OpWrite, 0), "", nil, ""), 404) // for another operation: nobody's
	s.want(s.send("GET", "/files?path=note.txt&signature=v1_x&signature_expiration=-1", "", nil, ""), 404)
}

func TestTrafficTokensAreComparedWhole(t *testing.T) {
	sb := node.Sandbox{ID: "a", TrafficToken: "secret"}
	for token, ok := range map[string]bool{"secret": true, "secre": false, "secrets": false, "": false} {
		if got := checkTraffic(sb, 80, token) == nil; got != ok {
			t.Errorf("%q: %v", token, got)
		}
	}
	if checkTraffic(node.Sandbox{}, 80, "") == nil {
		t.Error("a private sandbox without a token lets traffic in")
	}
}

func FuzzTrafficToken(f *testing.F) {
	f.Add("secret", "guess", 80)
	f.Fuzz(func(t *testing.T, secret, token string, port int) {
		got := checkTraffic(node.Sandbox{TrafficToken: secret}, port, token)
		if want := port == sandbox.GuestPort || secret != "" && token == secret; (got == nil) != want {
			t.Fatalf("secret %q, token %q, port %d: %v", secret, token, port, got)
		}
	})
}

func TestAServerMayAnswerBeforeItHasReadTheRequest(t *testing.T) {
	s := newServer(t)
	sb := s.create("")
	s.serve(sb.SandboxID, 8000, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		control := http.NewResponseController(w)
		_ = control.EnableFullDuplex()
		in := bufio.NewReader(r.Body)
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				return
			}
			fmt.Fprint(w, "echo "+line)
			_ = control.Flush()
		}
	}))
	body, send := io.Pipe()
	req, err := http.NewRequestWithContext(t.Context(), "POST", s.http.URL, body)
	must(t, err)
	req.Host = hostOf(8000, sb.SandboxID)
	go fmt.Fprintln(send, "one")
	res, err := http.DefaultTransport.RoundTrip(req)
	must(t, err)
	defer res.Body.Close()
	out := bufio.NewReader(res.Body)
	for _, word := range []string{"one", "two", "three"} {
		if word != "one" {
			_, err := fmt.Fprintln(send, word)
			must(t, err)
		}
		if line, err := out.ReadString('\n'); err != nil || line != "echo "+word+"\n" {
			t.Fatalf("%q, %v", line, err)
		}
	}
	_ = send.Close()
	if rest, err := io.ReadAll(out); err != nil || len(rest) != 0 {
		t.Errorf("%q, %v", rest, err)
	}
}

func TestGRPCGoesOnAsHTTP2(t *testing.T) {
	s := newServer(t)
	sb := s.create("")
	inside := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "Grpc-Status")
		fmt.Fprint(w, r.Proto)
		_ = http.NewResponseController(w).Flush()
		w.Header().Set("Grpc-Status", "0")
	}))
	inside.Config.Protocols = new(http.Protocols)
	inside.Config.Protocols.SetUnencryptedHTTP2(true)
	inside.Start()
	t.Cleanup(inside.Close)
	s.carry(sb.SandboxID, 50051, inside.Listener.Addr().String())
	r := s.want(s.send("POST", "/pkg.Service/Call", "", http.Header{"Content-Type": {"application/grpc+proto"}, "Te": {"trailers"}}, hostOf(50051, sb.SandboxID)), 200)
	if string(r.body) != "HTTP/2.0" {
		t.Errorf("the server inside saw %q", r.body)
	}
	if r.trailer.Get("Grpc-Status") != "0" {
		t.Errorf("trailer %v", r.trailer)
	}
}
