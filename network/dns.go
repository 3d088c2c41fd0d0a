package network

import (
	"context"
	"math"
	"net"
	"net/netip"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	maxQueries     = 512             // in flight, of all sandboxes
	maxOwnQueries  = 64              // in flight, of one sandbox
	queriesPerSec  = 200             // of one sandbox
	queryBurst     = 400             // of one sandbox
	plainSize      = 512             // bytes of a UDP answer without EDNS
	dnsIdle        = 5 * time.Second // of a TCP connection
	typeSVCB       = dnsmessage.Type(64)
	typeHTTPS      = dnsmessage.Type(65)
	typeIXFR       = dnsmessage.Type(251)
	typeAXFR       = dnsmessage.Type(252)
	typeANY        = dnsmessage.Type(255)
	dnsHeaderBytes = 12
)

// serveUDP answers questions that arrive as packets until conn is closed.
func (s *service) serveUDP(ctx context.Context, conn *net.UDPConn) {
	buf := make([]byte, 4096) // questions are far smaller
	for {
		size, from, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			if !rest(ctx) {
				return
			}
			continue
		}
		a := s.n.sender(from)
		if a == nil || !a.queries.Allow() || !a.enter() {
			continue // the client asks again
		}
		select {
		case s.slotsUDP <- struct{}{}:
		default:
			a.exit()
			continue
		}
		query := append([]byte(nil), buf[:size]...)
		s.running.Go(func() {
			defer func() { <-s.slotsUDP; a.exit() }()
			if reply := s.n.resolver.answer(ctx, a.rules.Load(), query, false); reply != nil {
				_, _ = conn.WriteToUDPAddrPort(reply, from) // lost packets are UDP's nature
			}
		})
	}
}

// serveDNSConn answers questions that arrive on one TCP connection, one after
// another.
func (s *service) serveDNSConn(ctx context.Context, a *attachment, _ *flow, conn *net.TCPConn) {
	for {
		if err := conn.SetDeadline(time.Now().Add(dnsIdle)); err != nil {
			return
		}
		query, err := readFramed(conn)
		if err != nil || a.queries.Wait(ctx) != nil {
			return
		}
		reply := s.n.resolver.answer(ctx, a.rules.Load(), query, true)
		if reply == nil || writeFramed(conn, reply) != nil {
			return
		}
	}
}

// answer handles one message of a sandbox; nil means that it deserves none.
func (r *resolver) answer(ctx context.Context, rules *rules, query []byte, tcp bool) []byte {
	q, head, limit, ok := parseQuery(query)
	if !ok {
		if len(query) < dnsHeaderBytes || head.Response {
			return nil
		}
		return pack(head, nil, dnsmessage.Message{Header: dnsmessage.Header{RCode: dnsmessage.RCodeFormatError}}, plainSize)
	}
	if tcp {
		limit = math.MaxUint16
	}
	if !allowed(rules, q) {
		return pack(head, &q, dnsmessage.Message{Header: dnsmessage.Header{RCode: dnsmessage.RCodeRefused}}, limit)
	}
	m, err := r.exchange(ctx, q)
	if err != nil {
		return pack(head, &q, dnsmessage.Message{Header: dnsmessage.Header{RCode: dnsmessage.RCodeServerFailure}}, limit)
	}
	return pack(head, &q, filter(rules, q.Name.String(), m), limit)
}

// parseQuery reads a message with one question. limit is how many bytes of an
// answer the sender takes by UDP.
func parseQuery(raw []byte) (q dnsmessage.Question, head dnsmessage.Header, limit int, ok bool) {
	var p dnsmessage.Parser
	head, err := p.Start(raw)
	if err != nil || head.Response || head.OpCode != 0 {
		return q, head, 0, false
	}
	questions, err := p.AllQuestions()
	if err != nil || len(questions) != 1 {
		return q, head, 0, false
	}
	limit = plainSize
	if p.SkipAllAnswers() == nil && p.SkipAllAuthorities() == nil {
		if rr, err := p.AdditionalHeader(); err == nil && rr.Type == dnsmessage.TypeOPT {
			limit = min(max(int(rr.Class), plainSize), ednsSize)
		}
	}
	return questions[0], head, limit, true
}

// allowed decides whether a question may be asked at all.
func allowed(rules *rules, q dnsmessage.Question) bool {
	switch q.Type {
	case typeANY, typeAXFR, typeIXFR:
		return false
	}
	return q.Class == dnsmessage.ClassINET && rules.decideName(q.Name.String())
}

// filter returns an answer without what the sandbox must not be led to. Service
// bindings are withheld: they carry addresses past the filter, and keys that hide
// names from the proxy. IPv6 addresses would lead nowhere.
func filter(rules *rules, name string, m dnsmessage.Message) dnsmessage.Message {
	out := dnsmessage.Message{Header: dnsmessage.Header{RCode: m.RCode}, Authorities: m.Authorities}
	for _, rr := range m.Answers {
		switch rr.Header.Type {
		case dnsmessage.TypeAAAA, typeSVCB, typeHTTPS:
			continue
		}
		if a, ok := rr.Body.(*dnsmessage.AResource); ok && !rules.decide(name, netip.AddrFrom4(a.A)) {
			continue
		}
		out.Answers = append(out.Answers, rr)
	}
	return out
}

// pack renders an answer to the question q, nil if there was none to read. An
// answer of more than limit bytes becomes an empty one marked as truncated.
func pack(head dnsmessage.Header, q *dnsmessage.Question, m dnsmessage.Message, limit int) []byte {
	m.Header = dnsmessage.Header{ID: head.ID, Response: true, OpCode: head.OpCode, RCode: m.RCode,
		RecursionDesired: head.RecursionDesired, RecursionAvailable: true}
	if q != nil {
		m.Questions = []dnsmessage.Question{*q}
	}
	raw, err := m.Pack()
	if err != nil || len(raw) > limit {
		m.Answers, m.Authorities = nil, nil
		m.Truncated = err == nil
		if err != nil {
			m.RCode = dnsmessage.RCodeServerFailure
		}
		if raw, err = m.Pack(); err != nil {
			return nil
		}
	}
	return raw
}
