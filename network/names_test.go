package network

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/atoll-run/atoll/sandbox"
)

// conformance: NFR1.3
func TestDomainsAreEnforcedByServerName(t *testing.T) {
	w := newWorld(t)
	z := w.serveNames(t)
	n := openNetwork(t, "a", nil)
	w.serveWeb(t, siteA, "A")
	w.serveWeb(t, siteB, "B")
	z.set("good.example", siteA)
	z.set("deep.sub.wild.example", siteA)
	z.set("wild.example", siteA)
	z.set("bad.example", siteB)
	policies := map[string]sandbox.NetworkPolicy{
		"internet off":    {AllowOut: []string{"good.example", "*.wild.example"}},
		"everything deny": {Internet: true, DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"good.example", "*.wild.example"}},
	}
	for name, policy := range policies {
		t.Run(name, func(t *testing.T) {
			l := attach(t, n, "one", policy)
			defer func() { must(t, n.Detach(t.Context(), "one")) }()
			gets(t, l.NetNS, siteA, "good.example", "A")
			gets(t, l.NetNS, siteA, "deep.sub.wild.example", "A")
			getsNothing(t, l.NetNS, siteA, "wild.example") // a wildcard is for what lies below
			getsNothing(t, l.NetNS, siteB, "bad.example")
			getsNothing(t, l.NetNS, siteA, "bad.example")
			gets(t, l.NetNS, siteB, "good.example", "A") // the name says where it goes, not the address
			refused(t, l.NetNS, siteA+":"+port)
			if got, err := get(t, l.NetNS, "https", siteA, ""); err == nil {
				t.Errorf("without a server name: got %q", got)
			}
		})
	}
}

func TestNamesResolveOnlyWhereThePolicyAllowsThem(t *testing.T) {
	w := newWorld(t)
	z := w.serveNames(t)
	n := openNetwork(t, "a", nil)
	z.set("good.example", siteA)
	z.set("bad.example", siteB)
	z.set("both.good.example", siteA, "2001:db8::1")
	many := make([]string, 100)
	for i := range many {
		many[i] = fmt.Sprintf("198.51.100.%d", i+1)
	}
	z.set("big.good.example", many...)
	l := attach(t, n, "one", sandbox.NetworkPolicy{AllowOut: []string{"good.example", "*.good.example"}})
	for _, server := range []string{l.Gateway.String(), siteA} { // whoever is asked, we answer
		for _, network := range []string{"udp4", "tcp4"} {
			if m := resolve(t, l.NetNS, network, server, "good.example", dnsmessage.TypeA); addresses(m) != siteA {
				t.Errorf("%s of %s: got %v", network, server, m)
			}
			if m := resolve(t, l.NetNS, network, server, "bad.example", dnsmessage.TypeA); m.RCode != dnsmessage.RCodeRefused {
				t.Errorf("%s of %s: got %v", network, server, m)
			}
		}
	}
	if z.questions("bad.example") != 0 {
		t.Error("a denied name left the host")
	}
	if z.questions("good.example") != 1 {
		t.Errorf("the cache let %d questions pass", z.questions("good.example"))
	}
	if m := resolve(t, l.NetNS, "udp4", l.Gateway.String(), "both.good.example", dnsmessage.TypeAAAA); m.RCode != 0 || len(m.Answers) != 0 {
		t.Errorf("IPv6: got %v", m)
	}
	if m := resolve(t, l.NetNS, "udp4", l.Gateway.String(), "no.good.example", dnsmessage.TypeAAAA); m.RCode != dnsmessage.RCodeNameError {
		t.Errorf("IPv6 of a name that does not exist: got %v", m)
	}
	if m := resolve(t, l.NetNS, "udp4", l.Gateway.String(), "good.example", typeANY); m.RCode != dnsmessage.RCodeRefused {
		t.Errorf("everything about a name: got %v", m)
	}
	if m := resolve(t, l.NetNS, "udp4", l.Gateway.String(), "big.good.example", dnsmessage.TypeA); !m.Truncated || len(m.Answers) != 0 {
		t.Errorf("a big answer by UDP: truncated %v, %d answers", m.Truncated, len(m.Answers))
	}
	if m := resolve(t, l.NetNS, "tcp4", l.Gateway.String(), "big.good.example", dnsmessage.TypeA); len(m.Answers) != len(many) {
		t.Errorf("a big answer by TCP: %d answers", len(m.Answers))
	}
	none := attach(t, n, "none", sandbox.NetworkPolicy{})
	if m := resolve(t, none.NetNS, "udp4", none.Gateway.String(), "good.example", dnsmessage.TypeA); m.RCode != dnsmessage.RCodeRefused {
		t.Errorf("without internet: got %v", m)
	}
	all := attach(t, n, "all", open)
	if m := resolve(t, all.NetNS, "udp4", all.Gateway.String(), "bad.example", dnsmessage.TypeA); addresses(m) != siteB {
		t.Errorf("with internet: got %v", m)
	}
	if m := resolve(t, all.NetNS, "udp4", all.Gateway.String(), "no.example", dnsmessage.TypeA); m.RCode != dnsmessage.RCodeNameError {
		t.Errorf("a name that does not exist: got %v", m)
	}
}

func TestNamesCannotBeReboundToTheHostsSurroundings(t *testing.T) {
	w := newWorld(t)
	z := w.serveNames(t)
	n := openNetwork(t, "a", nil)
	w.serveWeb(t, siteA, "A")
	w.serveWeb(t, privateAddr, "private")
	w.serveWeb(t, metadataAddr, "metadata")
	(&world{ns: hostNS}).serveWeb(t, hostAddr, "host")
	other := attach(t, n, "other", open)
	l := attach(t, n, "one", sandbox.NetworkPolicy{AllowOut: []string{"*.evil.example"}})
	for i, addr := range []string{privateAddr, metadataAddr, "127.0.0.1", other.Address.Addr().String(), n.service.at.dns.Addr().String(), "0.0.0.0", "255.255.255.255"} {
		name := fmt.Sprintf("r%d.evil.example", i)
		z.set(name, addr)
		for ns, server := range map[string]string{l.NetNS: l.Gateway.String(), other.NetNS: other.Gateway.String()} {
			if m := resolve(t, ns, "udp4", server, name, dnsmessage.TypeA); len(m.Answers) != 0 {
				t.Errorf("%s resolves to %s", name, addresses(m))
			}
		}
		getsNothing(t, l.NetNS, siteA, name)
	}
	// The host's own public address is in no list; the proxy knows it.
	z.set("host.evil.example", hostAddr)
	getsNothing(t, l.NetNS, siteA, "host.evil.example")
	must(t, n.Update(t.Context(), "one", sandbox.NetworkPolicy{AllowOut: []string{"*.evil.example", hostAddr}}))
	gets(t, l.NetNS, siteA, "host.evil.example", "host")
	// Of several addresses only the harmless ones count.
	z.set("mixed.evil.example", privateAddr, siteA)
	gets(t, l.NetNS, privateAddr, "mixed.evil.example", "A")
}

func TestUpdateJudgesCarriedConnectionsAnew(t *testing.T) {
	w := newWorld(t)
	z := w.serveNames(t)
	n := openNetwork(t, "a", nil)
	w.serveWeb(t, siteA, "A")
	z.set("kept.example", siteA)
	z.set("cut.example", siteA)
	l := attach(t, n, "one", sandbox.NetworkPolicy{AllowOut: []string{"kept.example", "cut.example"}})
	conns := map[string]net.Conn{}
	ask := func(host string) error {
		c := conns[host]
		must(t, c.SetDeadline(time.Now().Add(10*time.Second)))
		if _, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host); err != nil {
			return err
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, resp.Body)
		return errors.Join(err, resp.Body.Close())
	}
	for _, host := range []string{"kept.example", "cut.example"} {
		c, err := dialFrom(t, l.NetNS, siteA+":80")
		must(t, err)
		defer c.Close()
		conns[host] = c
		must(t, ask(host))
	}
	must(t, n.Update(t.Context(), "one", sandbox.NetworkPolicy{AllowOut: []string{"kept.example"}}))
	if err := ask("cut.example"); err == nil {
		t.Error("the denied connection goes on")
	}
	must(t, ask("kept.example"))
	getsNothing(t, l.NetNS, siteA, "cut.example")
}

func TestQUICIsDeniedWhereNamesDecide(t *testing.T) {
	w := newWorld(t)
	z := w.serveNames(t)
	n := openNetwork(t, "a", nil)
	z.set("good.example", siteA)
	var sink *net.UDPConn
	var err error
	within(t, w.ns, func() {
		sink, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(siteA+":443")))
	})
	must(t, err)
	defer sink.Close()
	send := func(l sandbox.Link, text string) {
		within(t, l.NetNS, func() {
			var c net.Conn
			if c, err = net.Dial("udp4", siteA+":443"); err == nil {
				_, err = c.Write([]byte(text))
				c.Close()
			}
		})
		must(t, err)
	}
	send(attach(t, n, "named", sandbox.NetworkPolicy{AllowOut: []string{"good.example"}}), "named")
	send(attach(t, n, "open", open), "open")
	buf := make([]byte, 16)
	must(t, sink.SetDeadline(time.Now().Add(5*time.Second)))
	size, err := sink.Read(buf)
	must(t, err)
	if string(buf[:size]) != "open" {
		t.Errorf("got a packet of %q", buf[:size])
	}
}

func TestNamesFailClosedWhileNobodyServes(t *testing.T) {
	w := newWorld(t)
	z := w.serveNames(t)
	w.serveWeb(t, siteA, "A")
	greet(t, w.ns, siteA+":"+port, "internet")
	z.set("good.example", siteA)
	cfg := Config{Dir: t.TempDir(), Prefix: "a", Upstream: []netip.AddrPort{netip.MustParseAddrPort(resolverAddr + ":53")}}
	n, err := Open(cfg)
	must(t, err)
	l := attach(t, n, "named", sandbox.NetworkPolicy{AllowOut: []string{"good.example"}})
	direct := attach(t, n, "direct", open)
	gets(t, l.NetNS, siteA, "good.example", "A")
	must(t, n.Close())
	getsNothing(t, l.NetNS, siteA, "good.example")
	reaches(t, direct.NetNS, siteA+":"+port, "internet")
	refused(t, direct.NetNS, privateAddr+":"+port)

	again := openNetwork(t, "a", func(c *Config) { c.Dir = cfg.Dir })
	gets(t, l.NetNS, siteA, "good.example", "A")
	if got := len(again.List()); got != 2 {
		t.Errorf("%d attachments were adopted", got)
	}
}

func TestFloodOfQuestionsIsBounded(t *testing.T) {
	newWorld(t)
	n := openNetwork(t, "a", nil)
	attach(t, n, "one", open)
	a := n.byID["one"]
	for range maxOwnQueries {
		if !a.enter() {
			t.Fatal("too few questions may be in flight")
		}
	}
	if a.enter() {
		t.Error("too many questions may be in flight")
	}
	passed := 0
	for range 10 * queryBurst {
		if a.queries.AllowN(time.Unix(1, 0), 1) {
			passed++
		}
	}
	if passed != queryBurst {
		t.Errorf("%d questions passed at once", passed)
	}
}

func FuzzAnswer(f *testing.F) {
	for _, kind := range []dnsmessage.Type{dnsmessage.TypeA, typeHTTPS, typeANY} {
		raw, _, err := newQuery(dnsmessage.Question{Name: dnsmessage.MustNewName("good.example."), Type: kind, Class: dnsmessage.ClassINET})
		must(f, err)
		f.Add(raw, true)
		f.Add(raw[:len(raw)-3], false)
	}
	r, err := compile(sandbox.NetworkPolicy{AllowOut: []string{"good.example"}}, DefaultPool)
	must(f, err)
	upstream := newResolver([]netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:1")})
	f.Fuzz(func(t *testing.T, query []byte, tcp bool) {
		reply := upstream.answer(context.Background(), r, query, tcp)
		if reply == nil {
			return
		}
		var m dnsmessage.Message
		if err := m.Unpack(reply); err != nil {
			t.Fatal(err)
		}
		if !m.Response || m.ID != binary.BigEndian.Uint16(query) {
			t.Fatalf("%v is no answer", m.Header)
		}
		if !tcp && len(reply) > ednsSize {
			t.Fatalf("%d bytes by UDP", len(reply))
		}
	})
}

// FuzzFilter feeds what a hostile upstream may send.
func FuzzFilter(f *testing.F) {
	q := dnsmessage.Question{Name: dnsmessage.MustNewName("good.example."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}
	good := (&zone{names: map[string][]string{"good.example": {siteA, privateAddr}}})
	query, _, err := newQuery(q)
	must(f, err)
	f.Add(good.answer(query, false))
	r, err := compile(sandbox.NetworkPolicy{AllowOut: []string{"good.example"}}, DefaultPool)
	must(f, err)
	f.Fuzz(func(t *testing.T, raw []byte) {
		if len(raw) < dnsHeaderBytes {
			return
		}
		m, err := parseAnswer(raw, binary.BigEndian.Uint16(raw), q)
		if err != nil {
			return
		}
		out := filter(r, "good.example", m)
		for _, rr := range out.Answers {
			if a, ok := rr.Body.(*dnsmessage.AResource); ok && r.protected.Contains(netip.AddrFrom4(a.A)) {
				t.Fatalf("%v passed", a)
			}
		}
		pack(m.Header, &q, out, ednsSize)
	})
}
