package network

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// zone is the resolver of the test's internet: names to addresses.
type zone struct {
	mu    sync.Mutex
	names map[string][]string
	asked []string
}

func (z *zone) set(name string, addrs ...string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.names[name] = addrs
}

func (z *zone) questions(name string) int {
	z.mu.Lock()
	defer z.mu.Unlock()
	count := 0
	for _, a := range z.asked {
		if a == name {
			count++
		}
	}
	return count
}

// answer gives every address twice over for names that begin with "big", so that
// they need TCP.
func (z *zone) answer(raw []byte, udp bool) []byte {
	var m dnsmessage.Message
	if m.Unpack(raw) != nil || len(m.Questions) != 1 {
		return nil
	}
	q := m.Questions[0]
	name := strings.TrimSuffix(q.Name.String(), ".")
	z.mu.Lock()
	defer z.mu.Unlock()
	z.asked = append(z.asked, name)
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	addrs, ok := z.names[name]
	if !ok {
		m.RCode = dnsmessage.RCodeNameError
	}
	if udp && strings.HasPrefix(name, "big") {
		m.Truncated, addrs = true, nil
	}
	for _, a := range addrs {
		addr := netip.MustParseAddr(a)
		head := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 60}
		switch {
		case q.Type == dnsmessage.TypeA && addr.Is4():
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: head, Body: &dnsmessage.AResource{A: addr.As4()}})
		case q.Type == dnsmessage.TypeAAAA && addr.Is6():
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: head, Body: &dnsmessage.AAAAResource{AAAA: addr.As16()}})
		}
	}
	out, err := m.Pack()
	if err != nil {
		return nil
	}
	return out
}

// serveNames answers on the resolver's address of the internet.
func (w *world) serveNames(t testing.TB) *zone {
	t.Helper()
	z := &zone{names: map[string][]string{}}
	at := netip.MustParseAddrPort(resolverAddr + ":53")
	var udp *net.UDPConn
	var tcp *net.TCPListener
	var err error
	within(t, w.ns, func() {
		udp, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
		if err == nil {
			tcp, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(at))
		}
	})
	must(t, err)
	t.Cleanup(func() { udp.Close(); tcp.Close() })
	go func() {
		buf := make([]byte, 4096)
		for {
			n, from, err := udp.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = udp.WriteToUDPAddrPort(z.answer(buf[:n], true), from)
		}
	}()
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			if raw, err := readFramed(c); err == nil {
				_ = writeFramed(c, z.answer(raw, false))
			}
			c.Close()
		}
	}()
	return z
}

// serveWeb serves HTTP and HTTPS at an address; answers name the server and
// the host that was asked for.
func (w *world) serveWeb(t testing.TB, addr, name string) {
	t.Helper()
	handler := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { fmt.Fprintf(rw, "%s %s", name, r.Host) })
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	cert, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)},
		&x509.Certificate{SerialNumber: big.NewInt(1)}, &key.PublicKey, key)
	must(t, err)
	for _, port := range []string{"80", "443"} {
		var l net.Listener
		within(t, w.ns, func() { l, err = net.Listen("tcp4", addr+":"+port) })
		must(t, err)
		if port == "443" {
			l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: key}}})
		}
		s := &http.Server{Handler: handler}
		go func() { _ = s.Serve(l) }()
		t.Cleanup(func() { s.Close() })
	}
}

// get asks for http://host/ or https://host/ at an address, from inside ns.
func get(t testing.TB, ns, scheme, addr, host string) (string, error) {
	t.Helper()
	port := map[string]string{"http": "80", "https": "443"}[scheme]
	c, err := dialFrom(t, ns, addr+":"+port)
	if err != nil {
		return "", err
	}
	defer c.Close()
	must(t, c.SetDeadline(time.Now().Add(10*time.Second)))
	if scheme == "https" {
		c = tls.Client(c, &tls.Config{ServerName: host, InsecureSkipVerify: true})
	}
	if _, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", host); err != nil {
		return "", err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	return string(body), err
}

func gets(t testing.TB, ns, addr, host, server string) {
	t.Helper()
	for _, scheme := range []string{"http", "https"} {
		if got, err := get(t, ns, scheme, addr, host); err != nil || got != server+" "+host {
			t.Errorf("%s://%s at %s: got %q, %v, want %q", scheme, host, addr, got, err, server)
		}
	}
}

func getsNothing(t testing.TB, ns, addr, host string) {
	t.Helper()
	for _, scheme := range []string{"http", "https"} {
		if got, err := get(t, ns, scheme, addr, host); err == nil {
			t.Errorf("%s://%s at %s: got %q", scheme, host, addr, got)
		}
	}
}

// resolve asks a server from inside ns.
func resolve(t testing.TB, ns, network, server, name string, kind dnsmessage.Type) dnsmessage.Message {
	t.Helper()
	q := dnsmessage.Question{Name: dnsmessage.MustNewName(name + "."), Type: kind, Class: dnsmessage.ClassINET}
	query, id, err := newQuery(q)
	must(t, err)
	var c net.Conn
	within(t, ns, func() { c, err = net.Dial(network, net.JoinHostPort(server, "53")) })
	must(t, err)
	defer c.Close()
	must(t, c.SetDeadline(time.Now().Add(10*time.Second)))
	var raw []byte
	if network == "tcp4" {
		must(t, writeFramed(c, query))
		raw, err = readFramed(c)
	} else {
		_, err = c.Write(query)
		must(t, err)
		raw = make([]byte, 4096)
		var n int
		n, err = c.Read(raw)
		raw = raw[:n]
	}
	must(t, err)
	m, err := parseAnswer(raw, id, q)
	must(t, err)
	return m
}

func addresses(m dnsmessage.Message) string {
	var out []string
	for _, rr := range m.Answers {
		if a, ok := rr.Body.(*dnsmessage.AResource); ok {
			out = append(out, netip.AddrFrom4(a.A).String())
		}
	}
	return strings.Join(out, " ")
}
