package network

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	upstreamTimeout = 2 * time.Second // per resolver asked
	maxUpstream     = 3
	maxCached       = 4096 // answers
	maxTTL          = time.Minute
	negativeTTL     = 5 * time.Second
	ednsSize        = 1232 // bytes of a UDP answer that pass everywhere unfragmented
)

// resolver asks the host's resolvers and remembers answers briefly, so that the
// web proxy sees what the sandbox was told.
type resolver struct {
	upstream func() []netip.AddrPort

	mu    sync.Mutex
	cache map[dnsmessage.Question]cached
}

type cached struct {
	answer  dnsmessage.Message // never changed after it was stored
	expires time.Time
}

// newResolver makes a resolver that asks the given servers in turn, or those of
// the host if there are none.
func newResolver(upstream []netip.AddrPort) *resolver {
	r := &resolver{cache: map[dnsmessage.Question]cached{}}
	r.upstream = func() []netip.AddrPort { return upstream }
	if len(upstream) == 0 {
		r.upstream = func() []netip.AddrPort { return hostResolvers("/etc/resolv.conf") }
	}
	return r
}

// hostResolvers reads the name servers of a resolv.conf; none on any error.
func hostResolvers(path string) []netip.AddrPort {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	var out []netip.AddrPort
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "nameserver" {
			if addr, err := netip.ParseAddr(f[1]); err == nil {
				out = append(out, netip.AddrPortFrom(addr, 53))
			}
		}
	}
	return out
}

// lookup returns the IPv4 addresses of a normal name.
func (r *resolver) lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	n, err := dnsmessage.NewName(name + ".")
	if err != nil {
		return nil, err
	}
	m, err := r.exchange(ctx, dnsmessage.Question{Name: n, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET})
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, rr := range m.Answers {
		if a, ok := rr.Body.(*dnsmessage.AResource); ok {
			out = append(out, netip.AddrFrom4(a.A))
		}
	}
	return out, nil
}

// exchange answers a question from the cache or from the first upstream that
// does. The caller must not change what it returns.
func (r *resolver) exchange(ctx context.Context, q dnsmessage.Question) (dnsmessage.Message, error) {
	now := time.Now()
	if name, err := dnsmessage.NewName(strings.ToLower(q.Name.String())); err == nil {
		q.Name = name // one place in the cache, however it is spelled
	}
	r.mu.Lock()
	c, ok := r.cache[q]
	r.mu.Unlock()
	if ok && now.Before(c.expires) {
		return c.answer, nil
	}
	err := errors.New("no resolver is configured")
	servers := r.upstream()
	for _, server := range servers[:min(len(servers), maxUpstream)] {
		var m dnsmessage.Message
		if m, err = ask(ctx, server, q); err != nil {
			continue
		}
		if m.RCode == dnsmessage.RCodeServerFailure || m.RCode == dnsmessage.RCodeRefused {
			err = fmt.Errorf("%s answered %s", server, m.RCode)
			continue
		}
		r.keep(q, m, now)
		return m, nil
	}
	return dnsmessage.Message{}, err
}

// keep stores an answer for its shortest lifetime.
func (r *resolver) keep(q dnsmessage.Question, m dnsmessage.Message, now time.Time) {
	ttl := maxTTL
	if len(m.Answers) == 0 {
		ttl = negativeTTL
	}
	for _, rr := range m.Answers {
		ttl = min(ttl, time.Duration(rr.Header.TTL)*time.Second)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.cache) >= maxCached {
		for k, c := range r.cache { // in random order: what has expired, and some more
			if now.After(c.expires) || len(r.cache) > maxCached*3/4 {
				delete(r.cache, k)
			}
		}
	}
	r.cache[q] = cached{m, now.Add(ttl)}
}

// ask puts one question to one resolver: by UDP, and by TCP when the answer
// does not fit.
func ask(ctx context.Context, server netip.AddrPort, q dnsmessage.Question) (dnsmessage.Message, error) {
	ctx, cancel := context.WithTimeout(ctx, upstreamTimeout)
	defer cancel()
	query, id, err := newQuery(q)
	if err != nil {
		return dnsmessage.Message{}, err
	}
	m, err := askBy(ctx, "udp", server, query, id, q)
	if err == nil && m.Truncated {
		m, err = askBy(ctx, "tcp", server, query, id, q)
	}
	return m, err
}

func newQuery(q dnsmessage.Question) (raw []byte, id uint16, err error) {
	var seed [2]byte
	_, _ = rand.Read(seed[:]) // never fails since Go 1.24
	id = binary.BigEndian.Uint16(seed[:])
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: id, RecursionDesired: true})
	var opt dnsmessage.ResourceHeader
	err = errors.Join(b.StartQuestions(), b.Question(q), b.StartAdditionals(),
		opt.SetEDNS0(ednsSize, dnsmessage.RCodeSuccess, false), b.OPTResource(opt, dnsmessage.OPTResource{}))
	if err != nil {
		return nil, 0, err
	}
	raw, err = b.Finish()
	return raw, id, err
}

func askBy(ctx context.Context, transport string, server netip.AddrPort, query []byte, id uint16, q dnsmessage.Question) (dnsmessage.Message, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, transport, server.String())
	if err != nil {
		return dnsmessage.Message{}, err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return dnsmessage.Message{}, err
	}
	if transport == "tcp" {
		if err := writeFramed(conn, query); err != nil {
			return dnsmessage.Message{}, err
		}
		raw, err := readFramed(conn)
		if err != nil {
			return dnsmessage.Message{}, err
		}
		return parseAnswer(raw, id, q)
	}
	if _, err := conn.Write(query); err != nil {
		return dnsmessage.Message{}, err
	}
	buf := make([]byte, 4096)
	for { // until the deadline: strangers may send anything to the port
		n, err := conn.Read(buf)
		if err != nil {
			return dnsmessage.Message{}, err
		}
		if m, err := parseAnswer(buf[:n], id, q); err == nil {
			return m, nil
		}
	}
}

// parseAnswer reads a message and checks that it answers q.
func parseAnswer(raw []byte, id uint16, q dnsmessage.Question) (dnsmessage.Message, error) {
	var m dnsmessage.Message
	if err := m.Unpack(raw); err != nil {
		return m, err
	}
	if m.ID != id || !m.Response || len(m.Questions) != 1 || !sameQuestion(m.Questions[0], q) {
		return m, errors.New("an answer to another question")
	}
	return m, nil
}

func sameQuestion(a, b dnsmessage.Question) bool {
	return a.Type == b.Type && a.Class == b.Class && strings.EqualFold(a.Name.String(), b.Name.String())
}

// writeFramed and readFramed carry messages over TCP: two bytes of length first.
func writeFramed(w io.Writer, msg []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(msg))), msg...))
	return err
}

func readFramed(r io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	msg := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(r, msg)
	return msg, err
}
