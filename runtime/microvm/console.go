package microvm

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/atoll-run/atoll/runtime/microvm/vmm"
	"github.com/atoll-run/atoll/sandbox"
)

const (
	// consoleName is the file with what a machine's console said: the number of its
	// first byte since the machine began, in eight bytes, then the newest ones, at
	// most twice consoleKept. What was said since it was last looked is still with
	// the monitor.
	consoleName = "console"
	newSuffix   = ".new"
	consoleKept = vmm.ConsoleSize
	consoleHead = 8
	// consoleTimeout bounds the question for it.
	consoleTimeout = 5 * time.Second
)

// Console returns what the machine of a sandbox wrote to its console, from the byte
// since on, or from the oldest that is kept, and the number of the byte after it.
func (r *Runtime) Console(ctx context.Context, id string, since int64) (text []byte, next int64, err error) {
	const op = "microvm.Console"
	b, err := r.boxes.Find(op, id)
	if err != nil {
		return nil, 0, err
	}
	if v, err := b.Live(op, sandbox.Running, sandbox.Paused); err == nil {
		if err := v.keepConsole(ctx); err != nil {
			return nil, 0, sandbox.E(op, "", id, err)
		}
	}
	first, text, err := readConsole(b.Dir)
	if err != nil {
		return nil, 0, sandbox.E(op, sandbox.Internal, id, err)
	}
	next = first + int64(len(text))
	if since > next {
		since = first // of another machine
	}
	return text[min(int64(len(text)), max(0, since-first)):], next, nil
}

// keepConsole moves what the console said from the monitor into the file.
func (v *vm) keepConsole(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, consoleTimeout)
	defer cancel()
	v.console.Lock()
	defer v.console.Unlock()
	words, err := v.machine.Console(ctx)
	return errors.Join(err, appendConsole(v.dir, words))
}

// readConsole reads the file in dir; there may be none yet.
func readConsole(dir string) (first int64, text []byte, err error) {
	data, err := os.ReadFile(filepath.Join(dir, consoleName))
	if errors.Is(err, os.ErrNotExist) || err == nil && len(data) < consoleHead {
		return 0, nil, nil
	}
	if err != nil {
		return 0, nil, err
	}
	return int64(binary.BigEndian.Uint64(data)), data[consoleHead:], nil
}

// appendConsole adds to the file, and drops the oldest when it has become long.
func appendConsole(dir string, words []byte) error {
	if len(words) == 0 {
		return nil
	}
	path := filepath.Join(dir, consoleName)
	info, err := os.Stat(path)
	if err == nil && info.Size() >= consoleHead && info.Size()+int64(len(words)) <= consoleHead+2*consoleKept {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		_, err = f.Write(words)
		return errors.Join(err, f.Close())
	}
	first, text, err := readConsole(dir)
	if err != nil {
		return err
	}
	text = append(text, words...)
	dropped := max(0, len(text)-consoleKept)
	data := binary.BigEndian.AppendUint64(nil, uint64(first)+uint64(dropped))
	if err := os.WriteFile(path+newSuffix, append(data, text[dropped:]...), 0o600); err != nil {
		return err
	}
	return os.Rename(path+newSuffix, path)
}

const (
	tailLines = 8   // of a console, for an error
	tailWidth = 160 // characters of one
)

// tail is the last lines of a console that have something in them, without what
// moves a terminal's cursor or colours its text.
func tail(console []byte) []string {
	var lines []string
	for line := range strings.Lines(string(console)) {
		if line = plain(line); line != "" {
			lines = append(lines, "  "+line[:min(len(line), tailWidth)])
		}
	}
	return lines[max(0, len(lines)-tailLines):]
}

// plain drops escape sequences and all that is not ASCII.
func plain(line string) string {
	var b strings.Builder
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == 0x1b && i+1 < len(line) && line[i+1] == '[':
			for i += 2; i < len(line) && (line[i] < '@' || line[i] > '~'); i++ {
			}
		case c >= ' ' && c <= '~':
			b.WriteByte(c)
		}
	}
	return strings.TrimSpace(b.String())
}
