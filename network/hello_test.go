package network

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
)

// hello is what Go's TLS client sends first.
func hello(t testing.TB, c *tls.Config) []byte {
	t.Helper()
	client, server := net.Pipe()
	defer server.Close()
	go func() {
		_ = tls.Client(client, c).Handshake()
		client.Close()
	}()
	var head [5]byte
	_, err := io.ReadFull(server, head[:])
	must(t, err)
	body := make([]byte, binary.BigEndian.Uint16(head[3:]))
	_, err = io.ReadFull(server, body)
	must(t, err)
	return append(head[:], body...)
}

// fragmented spreads a record's content over records of n bytes.
func fragmented(record []byte, n int) []byte {
	var out []byte
	for body := record[5:]; len(body) > 0; {
		k := min(n, len(body))
		out = append(out, record[0], record[1], record[2], byte(k>>8), byte(k))
		out = append(out, body[:k]...)
		body = body[k:]
	}
	return out
}

// withExtension appends an extension to a ClientHello.
func withExtension(t testing.TB, record []byte, kind uint16, data []byte) []byte {
	t.Helper()
	body := &reader{b: record[9:]}
	body.take(34)
	body.vector(1)
	body.vector(2)
	body.vector(1)
	at := len(record) - len(body.b) // of the length of the extensions
	out := append([]byte{}, record...)
	grow := 4 + len(data)
	binary.BigEndian.PutUint16(out[at:], binary.BigEndian.Uint16(out[at:])+uint16(grow))
	binary.BigEndian.PutUint16(out[3:], binary.BigEndian.Uint16(out[3:])+uint16(grow))
	binary.BigEndian.PutUint16(out[7:], binary.BigEndian.Uint16(out[7:])+uint16(grow))
	out = binary.BigEndian.AppendUint16(out, kind)
	out = binary.BigEndian.AppendUint16(out, uint16(len(data)))
	return append(out, data...)
}

func TestServerNameIsReadFromAnyClientHello(t *testing.T) {
	good := hello(t, &tls.Config{ServerName: "good.example"})
	for what, raw := range map[string][]byte{
		"as it is":                    good,
		"in records of one byte":      fragmented(good, 1),
		"in records of 100 bytes":     fragmented(good, 100),
		"with early data behind it":   append(append([]byte{}, good...), "more"...),
		"with an extension we ignore": withExtension(t, good, 0x0a0a, []byte("grease")),
	} {
		name, head, err := readServerName(bytes.NewReader(raw))
		if err != nil || name != "good.example" {
			t.Errorf("%s: got %q, %v", what, name, err)
		}
		if !bytes.HasPrefix(raw, head) {
			t.Errorf("%s: what was read is not what was sent", what)
		}
	}
}

func TestHelloWithoutATrustworthyNameIsRefused(t *testing.T) {
	good := hello(t, &tls.Config{ServerName: "good.example"})
	for what, c := range map[string]struct {
		raw  []byte
		want error
	}{
		"no name":        {hello(t, &tls.Config{InsecureSkipVerify: true}), errNoName},
		"hidden name":    {withExtension(t, good, 0xfe0d, []byte("secret")), errHidden},
		"two names":      {withExtension(t, good, 0, good[:0]), errNotHello},
		"not TLS":        {[]byte("GET / HTTP/1.1\r\nHost: good.example\r\n\r\n"), errNotHello},
		"SSH":            {[]byte("SSH-2.0-OpenSSH_9.2\r\n"), errNotHello},
		"other message":  {append([]byte{22, 3, 1, 0, 4, 2}, 0, 0, 0), errNotHello},
		"endless hello":  {fragmented(append([]byte{22, 3, 1, 0, 0, 1, 0xff, 0xff, 0xff}, make([]byte, 2*maxHello)...), 512), errNotHello},
		"endless drips":  {bytes.Repeat([]byte{22, 3, 1, 0, 0}, maxHello), errNotHello},
		"cut short":      {good[:len(good)-1], io.ErrUnexpectedEOF},
		"empty":          {nil, io.EOF},
		"broken lengths": {append(append([]byte{22, 3, 1, 0, 44, 1, 0, 0, 40}, make([]byte, 34)...), 200, 0, 0, 0, 0, 0), errNotHello},
	} {
		if name, _, err := readServerName(bytes.NewReader(c.raw)); !errors.Is(err, c.want) {
			t.Errorf("%s: got %q, %v, want %v", what, name, err, c.want)
		}
	}
}

func TestHostIsReadFromTheHeadOfARequest(t *testing.T) {
	for raw, want := range map[string]string{
		"GET / HTTP/1.1\r\nHost: good.example\r\n\r\n":                                     "good.example",
		"GET / HTTP/1.1\r\nHost: good.example:80\r\n\r\nmore":                              "good.example",
		"GET http://other.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n":                 "other.example",
		"POST / HTTP/1.0\r\nHost: good.example\r\nContent-Length: 3\r\n\r\nabc":            "good.example",
		"GET / HTTP/1.0\r\n\r\n":                                                           "",
		"CONNECT good.example:443 HTTP/1.1\r\nHost: good.example\r\n\r\n":                  "",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n":                                                 "",
		"GET / HTTP/1.1\r\nHost: good.example\r\n" + strings.Repeat("X: y\r\n", maxHello):  "",
		"GET / HTTP/1.1\r\nHost: good.example\r\nX: " + strings.Repeat("y", maxHello) + "": "",
		"nonsense": "",
	} {
		name, head, err := readHost(strings.NewReader(raw))
		if name != want || (err == nil) != (want != "") {
			t.Errorf("%.60q: got %q, %v", raw, name, err)
		}
		if !strings.HasPrefix(raw, string(head)) {
			t.Errorf("%.60q: what was read is not what was sent", raw)
		}
	}
}

func FuzzServerName(f *testing.F) {
	good := hello(f, &tls.Config{ServerName: "good.example"})
	f.Add(good)
	f.Add(fragmented(good, 7))
	f.Add(withExtension(f, good, 0xfe0d, []byte("secret")))
	f.Fuzz(func(t *testing.T, raw []byte) {
		name, head, err := readServerName(bytes.NewReader(raw))
		if len(head) > maxHello || !bytes.HasPrefix(raw, head) {
			t.Fatalf("%d bytes were read of %d", len(head), len(raw))
		}
		if err == nil && name == "" {
			t.Fatal("no name and no error")
		}
	})
}

func FuzzHost(f *testing.F) {
	f.Add("GET / HTTP/1.1\r\nHost: good.example\r\n\r\n")
	f.Add("GET http://a.example:80/ HTTP/1.1\r\nHost: [::1]:80\r\n\r\nrest")
	f.Fuzz(func(t *testing.T, raw string) {
		name, head, err := readHost(strings.NewReader(raw))
		if len(head) > maxHello || !strings.HasPrefix(raw, string(head)) {
			t.Fatalf("%d bytes were read of %d", len(head), len(raw))
		}
		if err == nil && name == "" {
			t.Fatal("no name and no error")
		}
	})
}
