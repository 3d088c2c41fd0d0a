package network

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
)

// maxHello bounds what is read before a connection is judged, in bytes.
const maxHello = 16 << 10

var (
	errNoName   = errors.New("the client names no server")
	errHidden   = errors.New("the client hides the server's name (ECH)")
	errNotHello = errors.New("not a TLS ClientHello")
)

// readServerName reads a TLS ClientHello from r and returns the server name in
// it. head holds all that was read, also on error. A client that encrypts the
// name gets errHidden: what it shows then need not be where it goes.
func readServerName(r io.Reader) (name string, head []byte, err error) {
	var raw bytes.Buffer
	in := io.TeeReader(io.LimitReader(r, maxHello), &raw)
	var hello []byte
	for want := 4; len(hello) < want; {
		var record [5]byte
		if _, err := io.ReadFull(in, record[:]); err != nil {
			return "", raw.Bytes(), err
		}
		size := int(binary.BigEndian.Uint16(record[3:]))
		if record[0] != 22 || record[1] != 3 || size == 0 || size > maxHello {
			return "", raw.Bytes(), errNotHello
		}
		fragment := make([]byte, size)
		if _, err := io.ReadFull(in, fragment); err != nil {
			return "", raw.Bytes(), err
		}
		hello = append(hello, fragment...)
		if len(hello) >= 4 {
			want = 4 + int(hello[1])<<16 + int(hello[2])<<8 + int(hello[3])
			if hello[0] != 1 || want > maxHello {
				return "", raw.Bytes(), errNotHello
			}
		}
	}
	name, err = serverName(hello[4 : 4+int(hello[1])<<16+int(hello[2])<<8+int(hello[3])])
	return name, raw.Bytes(), err
}

// serverName finds the name in the body of a ClientHello (RFC 8446, 4.1.2).
func serverName(body []byte) (string, error) {
	b := &reader{b: body}
	b.take(2 + 32) // version, random
	b.vector(1)    // session
	b.vector(2)    // cipher suites
	b.vector(1)    // compression
	ext := &reader{b: b.vector(2)}
	if b.failed {
		return "", errNotHello
	}
	name, found := "", false
	for len(ext.b) > 0 && !ext.failed {
		kind := ext.uint16()
		data := ext.vector(2)
		switch kind {
		case 0xfe0d: // encrypted_client_hello
			return "", errHidden
		case 0: // server_name
			if found {
				return "", errNotHello
			}
			found = true
			list := &reader{b: (&reader{b: data}).vector(2)}
			for len(list.b) > 0 && !list.failed {
				if kind, host := list.take(1), list.vector(2); !list.failed && kind[0] == 0 && name == "" {
					name = string(host)
				}
			}
			if list.failed {
				return "", errNotHello
			}
		}
	}
	if ext.failed {
		return "", errNotHello
	}
	if name == "" {
		return "", errNoName
	}
	return name, nil
}

// reader consumes bytes; once it has failed it gives nothing more.
type reader struct {
	b      []byte
	failed bool
}

func (r *reader) take(n int) []byte {
	if r.failed || n > len(r.b) {
		r.failed = true
		return nil
	}
	out := r.b[:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) uint16() int {
	b := r.take(2)
	if b == nil {
		return 0
	}
	return int(binary.BigEndian.Uint16(b))
}

// vector reads bytes that are preceded by their length in size bytes, 1 or 2.
func (r *reader) vector(size int) []byte {
	if size == 2 {
		return r.take(r.uint16())
	}
	n := r.take(1)
	if n == nil {
		return nil
	}
	return r.take(int(n[0]))
}

// readHost reads the head of an HTTP/1 request from r and returns the host that
// it is for, without a port. head holds all that was read, also on error.
func readHost(r io.Reader) (name string, head []byte, err error) {
	var raw bytes.Buffer
	req, err := http.ReadRequest(bufio.NewReader(io.TeeReader(io.LimitReader(r, maxHello), &raw)))
	if err != nil {
		return "", raw.Bytes(), err
	}
	if req.ProtoMajor != 1 || req.Method == http.MethodConnect {
		return "", raw.Bytes(), errNoName
	}
	host, _, err := net.SplitHostPort(req.Host)
	if err != nil { // no port
		host = req.Host
	}
	if host == "" {
		return "", raw.Bytes(), errNoName
	}
	return host, raw.Bytes(), nil
}
