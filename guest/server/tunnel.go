package server

import (
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/atoll-run/atoll/guest/wire"
)

// dialTimeout bounds a connection to loopback.
const dialTimeout = 5 * time.Second

// tunnel answers POST /connect: it turns the connection into one to a port on
// loopback, for runtimes that have a single channel into the sandbox.
func (s *Server) tunnel(w http.ResponseWriter, r *http.Request) {
	port, err := strconv.ParseUint(r.URL.Query().Get("port"), 10, 16)
	if err != nil || port == 0 {
		writeError(w, http.StatusBadRequest, "port must be a number from 1 to 65535")
		return
	}
	if !strings.EqualFold(r.Header.Get("Upgrade"), wire.UpgradeProtocol) {
		writeError(w, http.StatusUpgradeRequired, "send Connection: Upgrade and Upgrade: "+wire.UpgradeProtocol)
		return
	}
	target, err := dialLoopback(strconv.FormatUint(port, 10))
	if err != nil {
		writeError(w, http.StatusBadGateway, err.Error())
		return
	}
	defer target.Close()
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		writeError(w, http.StatusInternalServerError, err.Error())
		return
	}
	defer conn.Close()
	_, err = conn.Write([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + wire.UpgradeProtocol + "\r\n\r\n"))
	if err != nil {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		// What the client sent right after its request is in the reader.
		_, _ = io.Copy(target, buffered.Reader)
		closeWrite(target)
	}()
	_, _ = io.Copy(conn, target)
	// The service is done; the client may still send into the void until it
	// notices, which closing both ends below makes it do.
	closeWrite(conn)
	select {
	case <-done:
	case <-time.After(dialTimeout):
	}
}

func dialLoopback(port string) (net.Conn, error) {
	c, err := net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", port), dialTimeout)
	if err != nil {
		// A service may listen on IPv6 alone.
		if c6, err6 := net.DialTimeout("tcp", net.JoinHostPort("::1", port), dialTimeout); err6 == nil {
			return c6, nil
		}
	}
	return c, err
}

// closeWrite ends one direction of a connection, or both where it cannot.
func closeWrite(c net.Conn) {
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
		return
	}
	_ = c.Close()
}
