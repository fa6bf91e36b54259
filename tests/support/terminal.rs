//! A real pseudoterminal with its own session, in which a shell or the program under test runs.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex};

use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, unlockpt};
use nix::unistd::Pid;

use super::system::terminal_name;
use super::wait_for;

pub struct Terminal {
    master: Option<File>,
    child: Child,
    screen: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    /// Starts `command` as the leader of a new session, with this terminal as its controlling terminal.
    pub fn start(mut command: Command) -> Self {
        // The master is close-on-exec from the start. Otherwise a child of another test could inherit it, and keep the
        // terminal open.
        let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let slave = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(terminal_name(&master))
            .unwrap();
        let number = slave.as_raw_fd();
        let size = libc::winsize { ws_row: 40, ws_col: 200, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: setsid and ioctl are async-signal-safe; `slave` stays open until after the spawn.
        unsafe {
            libc::ioctl(number, libc::TIOCSWINSZ, &raw const size);
            command.pre_exec(move || {
                nix::unistd::setsid()?;
                if libc::ioctl(number, libc::c_ulong::from(libc::TIOCSCTTY), 0) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let copy = |descriptor: &File| descriptor.try_clone().unwrap();
        let child = command.stdin(copy(&slave)).stdout(copy(&slave)).stderr(copy(&slave)).spawn().unwrap();
        drop(command);
        drop(slave);
        let master = File::from(OwnedFd::from(master));
        let screen = Arc::<Mutex<Vec<u8>>>::default();
        let (mut source, into) = (master.try_clone().unwrap(), Arc::clone(&screen));
        // The reader ends when the last slave is closed, or when the master is closed.
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            loop {
                let mut ready = [nix::poll::PollFd::new(source.as_fd(), nix::poll::PollFlags::POLLIN)];
                let _ = nix::poll::poll(&mut ready, 100u16);
                if Arc::strong_count(&into) == 1 {
                    return;
                }
                if ready[0].any() == Some(true) {
                    match source.read(&mut bytes) {
                        Ok(length @ 1..) => into.lock().unwrap().extend(&bytes[..length]),
                        _ => return,
                    }
                }
            }
        });
        Self { master: Some(master), child, screen }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    /// Returns everything that was written to the terminal.
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned()
    }

    /// Returns everything that was written to the terminal, after its session has ended and its reader has read the
    /// rest. The exit of a process does not mean that its output was read.
    #[track_caller]
    pub fn whole_screen(&self) -> String {
        wait_for("the reader of the screen", || (Arc::strong_count(&self.screen) == 1).then_some(()), || self.screen());
        self.screen()
    }

    /// Like [`Terminal::whole_screen`], without escape sequences and carriage returns.
    #[track_caller]
    pub fn screen_at_its_end(&self) -> String {
        console::strip_ansi_codes(&self.whole_screen()).replace('\r', "")
    }

    pub fn type_in(&mut self, text: &str) {
        self.master.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        self.wait_for_times(text, 1);
    }

    #[track_caller]
    pub fn wait_for_times(&self, text: &str, times: usize) {
        wait_for(
            &format!("{times} times {text:?} on the screen"),
            || (self.screen().matches(text).count() >= times).then_some(()),
            || format!("{}\n{:?}", self.screen(), super::process::tree(self.pid())),
        );
    }

    /// Returns the foreground process group, which gets the signals of the keys.
    pub fn foreground(&self) -> Option<Pid> {
        nix::unistd::tcgetpgrp(self.master.as_ref()?).ok()
    }

    /// Whether the terminal echoes what a person types.
    pub fn echoes(&self) -> bool {
        let modes = nix::sys::termios::tcgetattr(self.master.as_ref().unwrap()).unwrap();
        modes.local_flags.contains(nix::sys::termios::LocalFlags::ECHO)
    }

    /// Gives the terminal another size.
    pub fn resize(&self, rows: u16, columns: u16) {
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the call reads `size`.
        unsafe { libc::ioctl(self.master.as_ref().unwrap().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    }

    /// Closes the terminal, as a closed window does. The kernel then hangs it up.
    pub fn close(&mut self) {
        // The reader has a copy of the master. It closes the copy when nothing else refers to its screen.
        let screen = std::mem::take(&mut *self.screen.lock().unwrap());
        self.screen = Arc::new(Mutex::new(screen));
        self.master = None;
    }

    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let (pid, screen) = (self.pid(), Arc::clone(&self.screen));
        wait_for(
            "the end of the session",
            || self.child.try_wait().unwrap(),
            || format!("{}\n{:?}", String::from_utf8_lossy(&screen.lock().unwrap()), super::process::tree(pid)),
        )
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            for (pid, ..) in super::process::tree(self.pid()) {
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
            let _ = self.child.wait();
        }
    }
}
