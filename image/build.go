package image

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// Machine is a sandbox in which a build runs commands.
type Machine interface {
	// Run runs a command to its end and returns its exit code. An error means
	// that it could not be run.
	Run(ctx context.Context, c Command) (exit int, err error)
	// Changes writes what changed in the root since the machine began, as an
	// OCI layer.
	Changes(ctx context.Context, w io.Writer) error
	// Close ends the machine and frees what it holds.
	Close(ctx context.Context) error
}

// Command is what a Machine runs.
type Command struct {
	Args   []string
	Env    []string // KEY=value; all there is
	User   string   // as in Config; empty means root
	Dir    string   // absolute
	Output io.Writer
}

// BuildRequest says what to build and with whose help.
type BuildRequest struct {
	Recipe  Recipe
	Target  string            // the stage to build; default: the last
	Context string            // host directory that COPY reads; empty: none
	Args    map[string]string // values of ARG
	Names   []string          // names for the result; none makes an image that only Prune finds
	NoCache bool

	// Base finds the image of a FROM; nil: Store.Get.
	Base func(ctx context.Context, ref string) (Image, error)
	// Start starts a machine on an image's root; nil: there are none, and RUN
	// fails with Unsupported.
	Start func(ctx context.Context, i Image) (Machine, error)

	Output io.Writer        // what commands print; nil: nowhere
	Report func(StepReport) // before and after each step; nil: none
}

// StepReport says how far a build is.
type StepReport struct {
	Stage  string // its name, or its number from 0
	Index  int    // of the step within the stage, from 0
	Total  int    // steps of the stage
	Step   Step
	Done   bool // false: begins
	Cached bool // nothing had to be done
}

// StepError is why a step failed. It is found in Build's error with errors.As.
type StepError struct {
	Index int
	Step  Step
	Exit  int // of the command; 0 when it could not be run
	Err   error
}

// Error names the step by its line where it has one.
func (e *StepError) Error() string {
	where := fmt.Sprintf("step %d", e.Index+1)
	if e.Step.Line > 0 {
		where = fmt.Sprintf("line %d", e.Step.Line)
	}
	if e.Exit != 0 {
		return fmt.Sprintf("%s: %s: exit code %d", where, e.Step, e.Exit)
	}
	return fmt.Sprintf("%s: %s: %v", where, e.Step, e.Err)
}

// Unwrap returns the cause; nil for an exit code.
func (e *StepError) Unwrap() error { return e.Err }

// rebaseBytes is how large a machine's changes may grow before the next command
// gets a machine of its own on a new root. Until then every command's result
// holds those of the commands before it.
const rebaseBytes = 64 << 20

// Build carries out a recipe. Results of steps are kept and found again by the
// hash of everything that they depend on. It fails with Invalid for a command
// that exits with another code than 0.
func (s *Store) Build(ctx context.Context, req BuildRequest) (Image, error) {
	const op = "image.Build"
	subject := strings.Join(req.Names, ",")
	for _, name := range req.Names {
		if err := checkName(Familiar(name)); err != nil {
			return Image{}, sandbox.E(op, sandbox.Invalid, name, err)
		}
	}
	inUse, err := s.lockBuilds(syscall.LOCK_SH)
	if err != nil {
		return Image{}, fail(op, subject, err)
	}
	defer inUse()
	b := newBuild(s, req)
	i, err := b.run(ctx)
	if err := errors.Join(err, b.close(ctx)); err != nil {
		return Image{}, fail(op, subject, err)
	}
	return i, nil
}

// lockBuilds keeps the results of steps from being forgotten during a build.
func (s *Store) lockBuilds(how int) (unlock func(), err error) {
	f, err := os.OpenFile(s.path("builds.lock"), os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock(f, how); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// build is one run of Build.
type build struct {
	store  *Store
	req    BuildRequest
	stages map[int]*state // finished ones

	context *contextDir // nil until the first COPY

	machine   Machine // nil: none
	machineOn state   // the files that it began with and what it did since
	rootOf    sandbox.Root
}

func newBuild(s *Store, req BuildRequest) *build {
	if req.Base == nil {
		req.Base = func(_ context.Context, ref string) (Image, error) { return s.Get(ref) }
	}
	if req.Output == nil {
		req.Output = io.Discard
	}
	if req.Report == nil {
		req.Report = func(StepReport) {}
	}
	return &build{store: s, req: req, stages: map[int]*state{}}
}

func (b *build) close(ctx context.Context) error {
	err := b.stopMachine(ctx)
	if b.context != nil {
		err = errors.Join(err, b.context.Close())
	}
	return err
}

func (b *build) run(ctx context.Context) (Image, error) {
	target := len(b.req.Recipe.Stages) - 1
	if b.req.Target != "" {
		target = b.findStage(b.req.Target, len(b.req.Recipe.Stages))
	}
	if target < 0 {
		return Image{}, sandbox.Errorf("build", sandbox.Invalid, "", "there is no stage %q", b.req.Target)
	}
	st, err := b.stage(ctx, target)
	if err != nil {
		return Image{}, err
	}
	image := Image{Config: st.config, Created: time.Now().UTC(), Platform: st.platform, Source: "built", Key: "build:" + st.key}
	err = b.materialize(ctx, st, func(root sandbox.Root, size int64) error {
		image.Root, image.Size = root, size
		image, err = b.store.addNames("image.Build", image, b.req.Names)
		return err
	})
	return image, err
}

// findStage returns the number of a stage before limit, by name or number; -1 if
// there is none.
func (b *build) findStage(name string, limit int) int {
	stages := b.req.Recipe.Stages[:limit]
	if n := slices.IndexFunc(stages, func(s Stage) bool { return s.Name != "" && strings.EqualFold(s.Name, name) }); n >= 0 {
		return n
	}
	if n, err := strconv.Atoi(name); err == nil && n >= 0 && n < limit {
		return n
	}
	return -1
}

// stage builds a stage and those that it stands on.
func (b *build) stage(ctx context.Context, n int) (*state, error) {
	if st := b.stages[n]; st != nil {
		return st, nil
	}
	stage := b.req.Recipe.Stages[n]
	st, err := b.begin(ctx, n, stage)
	if err != nil {
		return nil, err
	}
	name := stage.Name
	if name == "" {
		name = strconv.Itoa(n)
	}
	for i, step := range stage.Steps {
		r := StepReport{Stage: name, Index: i, Total: len(stage.Steps), Step: step}
		b.req.Report(r)
		r.Cached, err = b.step(ctx, n, st, step)
		if err != nil {
			var failed *StepError
			if !errors.As(err, &failed) {
				err = &StepError{Index: i, Step: step, Err: err}
			} else {
				failed.Index = i
			}
			return nil, sandbox.E("build", kindOfStep(err), "", err)
		}
		r.Done = true
		b.req.Report(r)
	}
	b.stages[n] = st
	return st, nil
}

// kindOfStep is the cause's kind; a command's exit code is the user's fault.
func kindOfStep(err error) sandbox.Kind {
	var failed *StepError
	if errors.As(err, &failed) && failed.Err == nil {
		return sandbox.Invalid
	}
	return ""
}

// begin returns the state that a stage starts from.
func (b *build) begin(ctx context.Context, n int, stage Stage) (*state, error) {
	global, err := b.globalArgs()
	if err != nil {
		return nil, err
	}
	from, err := expandWord(stage.From, func(name string) (string, bool) { return getEnv(global, name) })
	if err != nil {
		return nil, err
	}
	if parent := b.findStage(from, n); parent >= 0 && b.req.Recipe.Stages[parent].Name != "" {
		st, err := b.stage(ctx, parent)
		if err != nil {
			return nil, err
		}
		next := *st
		next.config, next.layers, next.args, next.cmdSet = st.config.clone(), slices.Clone(st.layers), nil, false
		return &next, nil
	}
	st := &state{platform: HostPlatform(), noCache: b.req.NoCache}
	if from == "scratch" {
		err := b.store.convert(ctx, conversion{}, func(root sandbox.Root, _ int64) error {
			st.root = root
			return b.store.writeResult(hashOf("scratch"), buildResult{Root: root.Digest})
		})
		if err != nil {
			return nil, err
		}
	} else {
		i, err := b.req.Base(ctx, from)
		if err != nil {
			return nil, err
		}
		if i.Root.Kind != sandbox.RootEROFS {
			return nil, sandbox.E("build", "", from, notFiles("build", i, "built upon")).WithHint("build on 'base', or on an image made with 'atoll image build --from debian'")
		}
		st.root, st.config, st.platform = i.Root, i.Config.clone(), i.Platform
	}
	st.key = hashOf("from", st.root.Digest, jsonText(st.config))
	return st, nil
}

// globalArgs are the ARGs before the first FROM.
func (b *build) globalArgs() ([]string, error) {
	st := &state{}
	for _, step := range b.req.Recipe.Args {
		if err := b.arg(st, step, nil); err != nil {
			return nil, err
		}
	}
	return st.args, nil
}

// arg declares an ARG, whose value is the request's, the global one or its default.
func (b *build) arg(st *state, step Step, global []string) error {
	step, err := st.expand(step)
	if err != nil {
		return err
	}
	for _, text := range step.Args {
		key, value, has := strings.Cut(text, "=")
		if g, ok := getEnv(global, key); ok && !has {
			value, has = g, true
		}
		if given, ok := b.req.Args[key]; ok {
			value, has = given, true
		}
		if has {
			st.args = setEnv(st.args, key, value)
		}
	}
	return nil
}

// step carries out one step of stage n on st.
func (b *build) step(ctx context.Context, n int, st *state, step Step) (cached bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if step.Op == OpArg {
		global, err := b.globalArgs()
		if err != nil {
			return false, err
		}
		return true, b.arg(st, step, global)
	}
	if step, err = st.expand(step); err != nil {
		return false, err
	}
	if len(step.Args) == 0 && step.Op != OpCmd && step.Op != OpEntrypoint {
		return false, invalid("%s wants an argument", step.Op)
	}
	st.noCache = st.noCache || step.NoCache
	same := step
	same.Line, same.Text, same.NoCache, same.Archive = 0, "", false, ""
	st.key = hashOf(st.key, jsonText(same))
	switch step.Op {
	case OpRun:
		return b.command(ctx, st, step)
	case OpCopy, OpAdd:
		return b.copy(ctx, n, st, step)
	case OpWorkdir:
		return b.workdir(ctx, st, step)
	}
	return true, st.configure(step)
}

func hashOf(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s,", len(p), p)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

func jsonText(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // only called with values of ours, which always encode
	}
	return string(text)
}
