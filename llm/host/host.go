package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/atoll-run/atoll/llm/chat"
	"github.com/atoll-run/atoll/llm/engine"
	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/llm/model"
	"github.com/atoll-run/atoll/llm/tokenizer"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// Config is how models are served.
type Config struct {
	Store   *Store
	Also    map[string]string // names for files and addresses that were not imported
	Threads int               // that compute; default all CPUs
	Memory  int64             // bytes for all models together; default four fifths of the machine's
	Engine  engine.Config     // of each model; Digest, KeepDir and Log are filled in
	Draft   string            // a model of the same tokens that guesses for each; "" is none
	Stretch model.Stretch     // for texts longer than the models were made for
	Keep    string            // directory in which prefixes are kept from one start to the next; "" is nowhere
	Log     *slog.Logger
}

// defaultWindow is the window of models that would allow more, unless it is asked
// for: memory for keys and values grows with it.
const defaultWindow = 8192

// Host has models in memory: those that are used, and as many of those used last
// as its memory holds. Its methods may be called from many goroutines.
type Host struct {
	config Config
	pool   *tensor.Pool

	mu     sync.Mutex
	models map[string]*Model // by reference, and digest where it is known
	closed bool
}

// New makes a host without models.
func New(c Config) (*Host, error) {
	if c.Threads <= 0 {
		c.Threads = runtime.NumCPU()
	}
	if c.Memory <= 0 {
		total, _, err := machineMemory()
		if err != nil {
			return nil, err
		}
		c.Memory = total / 5 * 4
	}
	return &Host{config: c, pool: tensor.NewPool(c.Threads, tensor.Best()), models: map[string]*Model{}}, nil
}

// Model is a model in memory.
type Model struct {
	Name     string
	Info     Info // what is known; of a file or an address only a part
	Engine   *engine.Engine
	Weights  *model.Model
	Tokens   *tokenizer.Tokenizer
	Template *chat.Template // nil when the model brings none
	Broken   error          // why there is no template though the model brings one
	// KnowsTools tells that the template has words for tools.
	KnowsTools bool
	Begun      time.Time // when loading began

	key    string // in Host.models
	bytes  int64  // predicted for all of it
	users  int
	used   time.Time // when it was given back last
	stop   context.CancelFunc
	source io.Closer
	small  *small        // guesses for it; nil is none
	ready  chan struct{} // closed when the fields above are there, or failed is
	failed error
}

// Use returns a model, which is loaded when it is not there: one of the store by
// its name, a GGUF file by a path with a slash or its suffix, or an HTTP address. It
// may be used before all weights are there. release must be called once. It fails
// with NotFound, and with Exhausted when there is no memory for it.
func (h *Host) Use(ctx context.Context, ref string) (m *Model, release func(), err error) {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return nil, nil, sandbox.Errorf("host.Use", sandbox.Unavailable, ref, "the node is being closed")
	}
	key := ref
	if info, err := h.config.Store.Info(ref); err == nil {
		key += " " + info.Digest // another model may get the name
	}
	m = h.models[key]
	if m == nil {
		m = &Model{Name: ref, key: key, ready: make(chan struct{})}
		h.models[key] = m
		go h.open(m, ref)
	}
	m.users++
	h.mu.Unlock()
	release = sync.OnceFunc(func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		m.users--
		m.used = time.Now()
	})
	select {
	case <-m.ready:
	case <-ctx.Done():
		release()
		return nil, nil, sandbox.E("host.Use", "", ref, ctx.Err())
	}
	if m.failed != nil {
		release()
		return nil, nil, m.failed
	}
	return m, release, nil
}

// open loads m; a failure is told to those that wait and forgotten.
func (h *Host) open(m *Model, ref string) {
	if err := h.load(m, ref); err != nil {
		if m.stop != nil {
			m.stop()
		}
		if m.source != nil {
			_ = m.source.Close()
		}
		if m.small != nil {
			_ = m.small.close(nil)
		}
		h.mu.Lock()
		delete(h.models, m.key)
		h.mu.Unlock()
		m.failed = err
	}
	close(m.ready)
}

func (h *Host) load(m *Model, ref string) error {
	const op = "host.load"
	ctx, stop := context.WithCancel(context.Background())
	m.stop, m.Begun = stop, time.Now()
	front, data, err := h.find(ctx, m, ref)
	if err != nil {
		return err
	}
	if err := h.config.Stretch.Apply(front); err != nil {
		return err
	}
	src, err := model.FromGGUFData(front, data)
	if err != nil {
		return err
	}
	if m.Tokens, err = tokenizer.FromGGUF(&front.Meta); err != nil {
		return err
	}
	c := src.Config()
	if err := m.Tokens.Fits(c.Vocab); err != nil {
		return sandbox.E(op, sandbox.Invalid, ref, err)
	}
	if text, ok := front.Meta.String("tokenizer.chat_template"); ok {
		m.Template, m.Broken = chat.Parse(text)
		m.KnowsTools = strings.Contains(text, "tools")
	}
	ec := h.config.Engine
	if ec.Window <= 0 {
		ec.Window = min(c.Context, defaultWindow)
	}
	ec.Digest, ec.Log = m.Info.Digest, h.config.Log
	if kind := h.config.Stretch.String(); kind != "" && ec.Digest != "" {
		ec.Digest += ":" + kind // its keys are others
	}
	if h.config.Keep != "" && ec.Digest != "" {
		ec.KeepDir = filepath.Join(h.config.Keep, strings.ReplaceAll(ec.Digest, ":", "-"))
	}
	weights, err := model.Weights(src, model.Shard{})
	if err != nil {
		return err
	}
	need := weights + engine.Memory(c, ec)
	if h.config.Draft != "" {
		if m.small, err = h.openSmall(ctx, m, c, ec); err != nil {
			return err
		}
		need += m.small.bytes
	}
	if err := h.reserve(m, need); err != nil {
		return err
	}
	if m.small != nil {
		if m.small.weights, err = model.Open(m.small.src, model.Options{Pool: h.pool}); err != nil {
			return err
		}
		ec.Draft = m.small.weights
	}
	if m.Weights, err = model.Open(src, model.Options{Pool: h.pool}); err != nil {
		return err
	}
	if m.Engine, err = engine.New(m.Weights, m.Tokens, ec); err != nil {
		stop() // or its loader would not end
		_ = m.Weights.Close()
		return err
	}
	if h.config.Log != nil {
		h.config.Log.Info("loading a model", "model", ref, "is", c.String(), "bytes", m.bytes)
	}
	return nil
}

// find opens the file of a reference.
func (h *Host) find(ctx context.Context, m *Model, ref string) (*gguf.File, io.ReaderAt, error) {
	if to, ok := h.config.Also[ref]; ok {
		ref = to
	}
	if IsURL(ref) {
		front, data, err := openURL(ctx, ref)
		if err != nil {
			return nil, nil, err
		}
		m.source = data
		return front, data, nil
	}
	path := ref
	if !strings.Contains(ref, "/") && !strings.HasSuffix(ref, ".gguf") {
		info, err := h.config.Store.Info(ref)
		if err != nil {
			return nil, nil, err
		}
		m.Info = info
		path = h.config.Store.Weights(ref)
	}
	r, err := gguf.Open(path)
	if err != nil {
		return nil, nil, err
	}
	m.source = r
	return r.File, r, nil
}

// reserve counts the memory of m, after closing what was used longest ago and is
// not in use, as far as needed.
func (h *Host) reserve(m *Model, need int64) error {
	const op = "host.reserve"
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return sandbox.Errorf(op, sandbox.Unavailable, m.Name, "the node is being closed")
	}
	for {
		used := int64(0)
		var loaded []resident
		for _, other := range h.models {
			used += other.bytes
			if other != m && other.bytes > 0 {
				loaded = append(loaded, resident{other.key, other.bytes, other.users, other.used})
			}
		}
		victims, ok := evict(loaded, used+need-h.config.Memory)
		if !ok {
			return sandbox.Errorf(op, sandbox.Exhausted, m.Name, "%s are needed, and of %s for models %s are in use", size(need), size(h.config.Memory), size(used)).
				WithHint("use a model with fewer bits, or a shorter window with --window")
		}
		if len(victims) == 0 {
			break
		}
		for _, name := range victims {
			if err := h.closeModel(h.models[name]); err != nil && h.config.Log != nil {
				h.config.Log.Error("closing a model", "model", name, "error", err)
			}
		}
	}
	if _, available, err := machineMemory(); err == nil && need > available {
		return sandbox.Errorf(op, sandbox.Exhausted, m.Name, "%s are needed, and %s of the machine's memory are free", size(need), size(available)).
			WithHint("use a model with fewer bits, or a shorter window with --window")
	}
	m.bytes = need
	return nil
}

// resident is what eviction needs to know of a model in memory.
type resident struct {
	name  string // its key
	bytes int64
	users int
	used  time.Time
}

// evict chooses the models to close so that so many bytes become free: those not in
// use, the least recently used first, and no more than needed. It reports whether
// that can be done.
func evict(loaded []resident, bytes int64) (names []string, ok bool) {
	for bytes > 0 {
		oldest := -1
		for i, r := range loaded {
			if r.users == 0 && r.bytes > 0 && (oldest < 0 || r.used.Before(loaded[oldest].used)) {
				oldest = i
			}
		}
		if oldest < 0 {
			return nil, false
		}
		names = append(names, loaded[oldest].name)
		bytes -= loaded[oldest].bytes
		loaded[oldest].bytes = 0
	}
	return names, true
}

// closeModel gives the memory of a model back. h.mu is held and nobody uses it.
func (h *Host) closeModel(m *Model) error {
	delete(h.models, m.key)
	m.stop() // of what still loads
	err := m.Engine.Close()
	if m.small != nil {
		err = m.small.close(err)
	}
	return errors.Join(err, m.Weights.Close(), m.source.Close())
}

// Loaded returns the models in memory, those that are being opened left out.
func (h *Host) Loaded() []*Model {
	h.mu.Lock()
	defer h.mu.Unlock()
	var list []*Model
	for _, m := range h.models {
		select {
		case <-m.ready:
			if m.failed == nil {
				list = append(list, m)
			}
		default:
		}
	}
	return list
}

// List returns the models that can be used by name: those that were imported, and
// those of Config.Also, of which only the name is known.
func (h *Host) List() ([]Info, error) {
	list, err := h.config.Store.List()
	for name, origin := range h.config.Also {
		list = append(list, Info{Name: name, Origin: origin})
	}
	slices.SortFunc(list, func(a, b Info) int { return strings.Compare(a.Name, b.Name) })
	return list, err
}

// Knows fails with NotFound, and a hint at what there is, unless a model can be used
// by this name.
func (h *Host) Knows(name string) error {
	if _, ok := h.config.Also[name]; ok {
		return nil
	}
	if _, err := h.config.Store.Info(name); err == nil {
		return nil
	}
	return sandbox.Errorf("host.Knows", sandbox.NotFound, name, "there is no model of this name").WithHint(h.config.Store.hint())
}

// Close closes all models. Requests under way fail.
func (h *Host) Close() error {
	h.mu.Lock()
	h.closed = true
	var opening []*Model
	for _, m := range h.models {
		opening = append(opening, m)
	}
	h.mu.Unlock()
	for _, m := range opening {
		<-m.ready
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	var err error
	for _, m := range h.models {
		err = errors.Join(err, h.closeModel(m))
	}
	h.pool.Close()
	return err
}

func size(bytes int64) string {
	if bytes < 0 {
		bytes = 0
	}
	if bytes < 1e9 {
		return fmt.Sprintf("%.0f MB", float64(bytes)/1e6)
	}
	return fmt.Sprintf("%.2f GB", float64(bytes)/1e9)
}

// machineMemory returns the machine's memory and what of it is free or can be, in bytes.
func machineMemory() (total, available int64, err error) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, 0, sandbox.E("host.machineMemory", sandbox.Internal, "", err)
	}
	for line := range strings.Lines(string(data)) {
		var kb int64
		if _, err := fmt.Sscanf(line, "MemTotal: %d kB", &kb); err == nil {
			total = kb << 10
		}
		if _, err := fmt.Sscanf(line, "MemAvailable: %d kB", &kb); err == nil {
			available = kb << 10
		}
	}
	return total, available, nil
}
