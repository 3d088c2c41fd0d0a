package server

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	processpb "github.com/atoll-run/atoll/guest/gen/process"
	"github.com/atoll-run/atoll/guest/wire"
)

const (
	logBytes = 1 << 20 // of JSON lines kept
	maxLine  = 8 << 10 // bytes: longer lines are cut into several entries
)

// logRing keeps the newest log lines in memory.
type logRing struct {
	mu     sync.Mutex
	lines  []logLine // oldest first
	bytes  int
	seq    uint64        // of the newest entry
	change chan struct{} // closed and replaced when an entry arrives
}

// logLine is an encoded entry, newline included.
type logLine struct {
	seq  uint64
	json []byte
}

func newLogRing() *logRing { return &logRing{change: make(chan struct{})} }

// add stamps and keeps an entry; the oldest make room for it.
func (l *logRing) add(e wire.LogEntry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seq++
	e.Seq, e.Time = l.seq, time.Now().UTC()
	text, err := json.Marshal(e)
	if err != nil {
		return // cannot be: the entry holds strings and numbers only
	}
	l.lines = append(l.lines, logLine{e.Seq, append(text, '\n')})
	l.bytes += len(text) + 1
	drop := 0
	for l.bytes > logBytes {
		l.bytes -= len(l.lines[drop].json)
		l.lines[drop].json = nil
		drop++
	}
	l.lines = l.lines[drop:]
	close(l.change)
	l.change = make(chan struct{})
}

// after returns the lines after seq and a channel that closes when there are more.
func (l *logRing) after(seq uint64) ([]logLine, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, line := range l.lines {
		if line.seq > seq {
			return append([]logLine(nil), l.lines[i:]...), l.change
		}
	}
	return nil, l.change
}

func (l *logRing) start(p *process, run launch) {
	l.add(wire.LogEntry{Event: wire.LogStart, PID: p.child.pid, Tag: p.tagName(), User: run.acct.name, Cmd: clip(run.argv)})
}

func (l *logRing) exit(p *process, end *processpb.ProcessEvent_EndEvent) {
	code := int(end.GetExitCode())
	l.add(wire.LogEntry{
		Event: wire.LogExit, PID: p.child.pid, Tag: p.tagName(),
		ExitCode: &code, Status: end.GetStatus(), Error: end.GetError(),
	})
}

func (p *process) tagName() string {
	if p.tag == nil {
		return ""
	}
	return *p.tag
}

// clip shortens a command to what a log line may hold.
func clip(argv []string) []string {
	out, room := make([]string, 0, len(argv)), maxLine
	for _, arg := range argv {
		if len(arg) > room {
			return append(out, strings.ToValidUTF8(arg[:room], "")+"...")
		}
		out, room = append(out, arg), room-len(arg)
	}
	return out
}

// lineWriter cuts a process's output into lines for the log. It belongs to one
// goroutine.
type lineWriter struct {
	logs  *logRing
	p     *process
	event string
	rest  []byte // the beginning of a line, at most maxLine bytes
}

// write takes the next bytes; none means that no more come.
func (w *lineWriter) write(data []byte) {
	if len(data) == 0 && len(w.rest) > 0 {
		w.flush(w.rest)
		w.rest = nil
	}
	for len(data) > 0 {
		i := bytes.IndexByte(data, '\n')
		whole := i >= 0
		if !whole {
			i = len(data)
		}
		if room := maxLine - len(w.rest); i > room {
			i, whole = room, false
		}
		w.rest = append(w.rest, data[:i]...)
		data = data[i:]
		if whole {
			data = data[1:]
		}
		if whole || len(w.rest) == maxLine {
			w.flush(w.rest)
			w.rest = w.rest[:0]
		}
	}
}

func (w *lineWriter) flush(line []byte) {
	text := strings.ToValidUTF8(string(bytes.TrimSuffix(line, []byte("\r"))), "\ufffd")
	w.logs.add(wire.LogEntry{Event: w.event, PID: w.p.child.pid, Tag: w.p.tagName(), Line: text})
}

// readLogs answers GET /logs.
func (s *Server) readLogs(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	var since uint64
	if text := q.Get("since"); text != "" {
		var err error
		if since, err = strconv.ParseUint(text, 10, 64); err != nil {
			writeError(w, http.StatusBadRequest, "since must be a sequence number")
			return
		}
	}
	follow, _ := strconv.ParseBool(q.Get("follow"))
	w.Header().Set("Content-Type", "application/x-ndjson")
	for {
		lines, more := s.logs.after(since)
		for _, line := range lines {
			if _, err := w.Write(line.json); err != nil {
				return
			}
			since = line.seq
		}
		if !follow {
			return
		}
		if err := http.NewResponseController(w).Flush(); err != nil {
			return
		}
		select {
		case <-more:
		case <-r.Context().Done():
			return
		}
	}
}
