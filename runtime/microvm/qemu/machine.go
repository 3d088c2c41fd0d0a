package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"

	"github.com/atoll-run/atoll/runtime/microvm/vmm"
	"github.com/atoll-run/atoll/runtime/process"
)

// machine is one QEMU.
type machine struct {
	proc   *process.Process
	qmp    *client
	output *os.File // what QEMU said on its own account; nil for an adopted one
	serial net.Conn // connected from the start; nil once Serial handed it out

	mu      sync.Mutex
	given   net.Conn // what Serial handed out last; nil before
	words   []byte   // of the console, not taken yet
	dir     string
	memory  *memoryMap    // nil until it was looked up
	changed chan struct{} // closed and made anew at each event
	events  [eventsKept]event
	seen    int // events so far; the last eventsKept are in events
	ended   chan struct{}
	cause   string
}

// eventsKept is how many of QEMU's events are remembered for those who wait for one.
const eventsKept = 32

func newMachine(dir string, p *process.Process) *machine {
	return &machine{dir: dir, proc: p, changed: make(chan struct{}), ended: make(chan struct{})}
}

// Process returns QEMU's process.
func (m *machine) Process() *process.Process { return m.proc }

// Move says that the machine's directory has another name now.
func (m *machine) Move(dir string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dir = dir
}

// Ended is closed when the guest or QEMU has ended.
func (m *machine) Ended() <-chan struct{} { return m.ended }

// Cause says why the machine ended.
func (m *machine) Cause() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cause
}

// Serial connects to the guest's port.
func (m *machine) Serial() (net.Conn, error) {
	m.mu.Lock()
	conn, dir := m.serial, m.dir
	m.serial = nil
	m.mu.Unlock()
	if conn == nil {
		var err error
		if conn, err = dial(dir, serialName); err != nil {
			return nil, err
		}
	}
	m.mu.Lock()
	m.given = conn
	m.mu.Unlock()
	return conn, nil
}

// take is called for every event, by the goroutine that reads them.
func (m *machine) take(e event) {
	m.mu.Lock()
	m.events[m.seen%eventsKept] = e
	m.seen++
	close(m.changed)
	m.changed = make(chan struct{})
	m.mu.Unlock()
	switch e.Name {
	case eventGone:
		m.end("")
	case "RESET":
		// The agent that was at the other end is gone without a word.
		m.mu.Lock()
		if m.given != nil {
			m.given.Close() // whoever has it notices, and may have closed it
		}
		m.mu.Unlock()
	case "SHUTDOWN", "GUEST_PANICKED":
		// The reader of events must go on, for the question has an answer.
		go m.end(shutdownReason(e))
	}
}

// shutdownReason puts QEMU's word for the guest's end into ours. Empty: QEMU
// itself was told to end.
func shutdownReason(e event) string {
	var data struct {
		Guest  bool   `json:"guest"`
		Reason string `json:"reason"`
	}
	_ = json.Unmarshal(e.Data, &data) // else the reason stays unknown
	switch {
	case e.Name == "GUEST_PANICKED" || data.Reason == "guest-panic":
		return "the guest's kernel panicked"
	case data.Reason == "guest-reset":
		return "the guest's kernel started anew"
	case data.Guest:
		return "the guest switched itself off"
	}
	return ""
}

// end records the machine's end, once.
func (m *machine) end(reason string) {
	var words []byte
	if reason != "" {
		ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
		defer cancel()
		words, _ = m.readConsole(ctx) // without them the reason stands alone
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.keep(words)
	select {
	case <-m.ended:
		return
	default:
	}
	m.cause = reason
	if panicked := panicLine(string(words)); panicked != "" {
		m.cause = "the guest's kernel panicked: " + panicked
	}
	close(m.ended)
}

// readConsole takes what the guest wrote to its console since the last time.
func (m *machine) readConsole(ctx context.Context) ([]byte, error) {
	const piece = maxMessage / 4
	var words []byte
	for len(words) < vmm.ConsoleSize {
		var text []byte // in base64, which json knows: it may be anything
		err := m.qmp.call(ctx, "ringbuf-read", map[string]any{"device": "console", "size": piece, "format": "base64"}, &text)
		words = append(words, text...)
		if err != nil || len(text) < piece {
			return words, err
		}
	}
	return words, nil
}

// keep adds to the words that were not taken yet. mu is held.
func (m *machine) keep(words []byte) {
	m.words = append(m.words, words...)
	m.words = m.words[max(0, len(m.words)-vmm.ConsoleSize):]
}

// Console takes what the guest wrote to its console since the last call.
func (m *machine) Console(ctx context.Context) ([]byte, error) {
	words, err := m.readConsole(ctx)
	if errors.Is(err, errGone) {
		err = nil // then there is what was read at the end
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.keep(words)
	words, m.words = m.words, nil
	if err != nil {
		return words, m.explain("read the console", err)
	}
	return words, nil
}

// panicLine finds why the kernel panicked in what it printed.
func panicLine(console string) string {
	const mark = "Kernel panic - not syncing: "
	_, rest, found := strings.Cut(console, mark)
	if !found {
		return ""
	}
	line, _, _ := strings.Cut(rest, "\n")
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, line[:min(len(line), 200)])
}

// await waits for an event that came after the first since ones and that match
// accepts. It fails when the machine ends.
func (m *machine) await(ctx context.Context, since int, match func(event) (bool, error)) error {
	for {
		m.mu.Lock()
		changed := m.changed
		for ; since < m.seen; since++ {
			if m.seen-since > eventsKept {
				continue
			}
			e := m.events[since%eventsKept]
			ok, err := match(e)
			if e.Name == eventGone && !ok && err == nil {
				err = errGone
			}
			if ok || err != nil {
				m.mu.Unlock()
				return err
			}
		}
		m.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// mark is the number of events so far, for await.
func (m *machine) mark() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.seen
}

// Pause stops all processors.
func (m *machine) Pause(ctx context.Context) error { return m.qmp.call(ctx, "stop", nil, nil) }

// Resume lets them go on.
func (m *machine) Resume(ctx context.Context) error { return m.qmp.call(ctx, "cont", nil, nil) }

// Load gives device state to a machine that waits.
func (m *machine) Load(ctx context.Context, devices *os.File) error {
	since := m.mark()
	const name = "devices"
	err := m.qmp.call(ctx, "getfd", map[string]any{"fdname": name}, nil, int(devices.Fd()))
	if err == nil {
		err = m.qmp.call(ctx, "migrate-incoming", map[string]any{"uri": "fd:" + name}, nil)
	}
	if err == nil {
		err = m.await(ctx, since, func(e event) (bool, error) { return e.Name == "RESUME", nil })
	}
	if err != nil {
		return m.explain("load the state of devices", err)
	}
	return nil
}

// explain adds what QEMU said before it ended.
func (m *machine) explain(what string, err error) error {
	if errors.Is(err, errGone) && m.output != nil {
		buf := make([]byte, 2048)
		n, _ := m.output.ReadAt(buf, 0)
		if text := string(bytes.TrimSpace(bytes.TrimRight(buf[:n], "\x00"))); text != "" {
			return fmt.Errorf("%s: QEMU ended: %s", what, text)
		}
	}
	return fmt.Errorf("%s: %w", what, err)
}

// SaveDevices writes the state of processors and devices.
func (m *machine) SaveDevices(ctx context.Context, to *os.File) error {
	return m.withFile(ctx, to, func(path string) error {
		return m.qmp.call(ctx, "xen-save-devices-state", map[string]any{"filename": path, "live": false}, nil)
	})
}

// withFile hands files to QEMU, which opens what is at path by one of them.
func (m *machine) withFile(ctx context.Context, f *os.File, use func(path string) error) error {
	var set struct {
		ID int `json:"fdset-id"`
	}
	if err := m.qmp.call(ctx, "add-fd", nil, &set, int(f.Fd())); err != nil {
		return err
	}
	err := use(fmt.Sprintf("/dev/fdset/%d", set.ID))
	return errors.Join(err, m.qmp.call(ctx, "remove-fd", map[string]any{"fdset-id": set.ID}, nil))
}

// Kill ends QEMU at once and waits until it is gone.
func (m *machine) Kill() error {
	err := m.proc.Kill()
	if err == nil {
		err = m.proc.Wait(context.Background())
	}
	return errors.Join(err, m.Close())
}

// Close lets QEMU go.
func (m *machine) Close() error {
	m.mu.Lock()
	serial, memory := m.serial, m.memory
	m.serial, m.memory = nil, nil
	m.mu.Unlock()
	var errs []error
	if serial != nil {
		errs = append(errs, serial.Close())
	}
	if memory != nil {
		errs = append(errs, memory.Close())
	}
	if m.output != nil {
		errs = append(errs, m.output.Close())
	}
	if m.qmp != nil {
		if err := m.qmp.close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	if err := m.proc.Close(); !errors.Is(err, os.ErrClosed) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

var _ vmm.Machine = (*machine)(nil)
