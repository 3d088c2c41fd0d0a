package image

import "fmt"

// Op is what a step of a build does.
type Op string

// The operations. What they leave out of Dockerfiles is refused by ParseDockerfile.
const (
	OpRun        Op = "run"        // Args: a command line for the shell, or argv when Exec
	OpCopy       Op = "copy"       // Args: sources, then the destination
	OpAdd        Op = "add"        // as OpCopy, and archives among the sources are unpacked
	OpEnv        Op = "env"        // Args: KEY=value
	OpArg        Op = "arg"        // Args: KEY or KEY=default; known to later steps of the stage only
	OpWorkdir    Op = "workdir"    // Args: one path
	OpUser       Op = "user"       // Args: user or user:group
	OpCmd        Op = "cmd"        // Args as for OpRun
	OpEntrypoint Op = "entrypoint" // Args as for OpRun
	OpExpose     Op = "expose"     // Args: port or port/protocol
	OpLabel      Op = "label"      // Args: KEY=value
	OpShell      Op = "shell"      // Args: argv that a command line is appended to
)

// Step is one step of a build. It is a value that can be written as JSON, so
// that builds can be asked for in other forms than Dockerfiles.
type Step struct {
	Op   Op       `json:"op"`
	Args []string `json:"args"`
	Exec bool     `json:"exec,omitempty"` // Args are argv, no shell
	User string   `json:"user,omitempty"` // of OpRun: instead of the image's user

	From    string `json:"from,omitempty"`    // of OpCopy: a stage or image to copy from
	Archive string `json:"archive,omitempty"` // of OpCopy: host path of a tar archive to copy from
	Chown   string `json:"chown,omitempty"`   // of OpCopy: user or user:group; empty means root
	Chmod   string `json:"chmod,omitempty"`   // of OpCopy: octal; empty means as it was

	// Raw says that Args, From and Chown still hold quotes and variables, as
	// in a Dockerfile. OpRun's never do: they are the shell's.
	Raw     bool   `json:"raw,omitempty"`
	NoCache bool   `json:"noCache,omitempty"` // do this step and all after it anew
	Line    int    `json:"line,omitempty"`    // in the Dockerfile, from 1
	Text    string `json:"text,omitempty"`    // for people; default: from Op and Args
}

// String is the step for people.
func (s Step) String() string {
	if s.Text != "" {
		return s.Text
	}
	return fmt.Sprintf("%s %q", s.Op, s.Args)
}

// Stage is a chain of steps on top of an image or of an earlier stage.
type Stage struct {
	Name  string `json:"name,omitempty"`
	From  string `json:"from"` // a stage's name, an image's, or "scratch"
	Steps []Step `json:"steps"`
}

// Recipe is what to build: the last stage, or the one that is asked for, with
// the stages that it needs.
type Recipe struct {
	Stages []Stage `json:"stages"`
	Args   []Step  `json:"args,omitempty"` // OpArg steps before the first stage, for From
}
